"""A pass over a data set that loses nothing: only units that no bundle holds are run, and each is committed once.

Partials stay in Ray's object store; the driver groups references to them, a task combines and commits each group, and the
driver gets a receipt. So the driver's memory depends neither on the number of images nor on the size of a partial. Several
drivers of one run share its units: each claims some, looks at what the others have done, and waits for those who live.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from patchsae_ray import storage
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import NotFound, UserError, user_error
from patchsae_ray.pipelines.bundles import BadRows, Bundle, BundleFolder, Notes, choose, uncovered
from patchsae_ray.pipelines.claims import Claims, Held
from patchsae_ray.pipelines.cluster import several_machines
from patchsae_ray.pipelines.devices import warn_of_several
from patchsae_ray.pipelines.given_up import GivenUp
from patchsae_ray.pipelines.heartbeat import Heartbeat, Peers, driver_of
from patchsae_ray.pipelines.merging import helpers, merged_contents, naming_the_image
from patchsae_ray.pipelines.pass_record import Pass
from patchsae_ray.pipelines.progress import Patience
from patchsae_ray.pipelines.runner import Session
from patchsae_ray.pipelines.units import Totals, UnitTask
from patchsae_ray.pipelines.waves import Waves
from patchsae_ray.writing import remove_tree

log = logging.getLogger(__name__)

WAVE_UNITS = 20_000
"""Units that Ray Data is told of at once, so that what it keeps of each stays small."""
MAX_FRUITLESS = 5
"""Waves in a row of which nothing could be committed, after which a pass is given up."""
PAUSE_SECONDS = 5.0
"""After the first of them, and longer after each; also between two looks at what others do."""

T = TypeVar("T", bound=Totals)


@dataclass(frozen=True)
class _Others:
    """What a driver knows of the others: the units that they have claimed, and those that they have given up."""

    claims: Claims
    given_up: GivenUp


@dataclass
class UnitPass(Generic[T]):
    """A pass on Ray.

    Args:
        what: the job's name in its lines.
        manifest: the images.
        image_size: side of the decoded pixels.
        task: what the actors run.
        totals: what their results are merged in.
        session: plan, tracker and results folder.
        run_key: under which bundles are committed.
        max_bad_fraction: share of unreadable images up to which the pass goes on.
        no_progress_minutes: after which it is given up.
        commit_seconds: how long partials wait, at most, for others to be committed with.
        whole: what positions in the actors' errors are of, where that is not `manifest`.
    """

    what: str
    manifest: Manifest
    image_size: int
    task: UnitTask
    totals: type[T]
    session: Session
    run_key: str
    max_bad_fraction: float
    no_progress_minutes: float
    commit_seconds: float = 60.0
    whole: Manifest | None = None

    def __post_init__(self) -> None:
        self.manifest = keep(self.manifest)
        name = f"{self.run_key}-{self.manifest.cut}" if self.manifest.cut else self.run_key
        uri = storage.absolute(storage.join(self.session.folder.uri, "bundles", name))
        local = storage.is_local(uri)  # then the other machines, if there are any, see neither the manifest nor the bundles
        self._where = helpers(local)
        if local and several_machines():
            self.manifest = replace(self.manifest, units=self.manifest.units.in_memory())
        self.folder = BundleFolder(uri, len(self.manifest.units))
        self._sizes = np.diff(self.manifest.units.edges())
        """[unit] images."""

    def run(self) -> tuple[T, Pass]:
        """Run what no bundle holds and no other driver runs, then merge all bundles.

        Raises: UserError past `max_bad_fraction`, without progress, where the store stays away, or for an image that spoils it.
        """
        kept = Pass(self.max_bad_fraction, self.manifest.num_images, len(self.manifest.units), bundles=self.folder.uri)
        kept.units_before = kept.num_units
        log.info("%s: %s images in %s units", self.what, f"{kept.num_images:,}", f"{kept.num_units:,}")
        failed: dict[int, str] = {}
        with (
            self._tidied(),
            Heartbeat(self.folder.uri) as heartbeat,
            naming_the_image(self.whole or self.manifest),
        ):
            others, totals = self._others(heartbeat.driver), None
            while totals is None:
                chosen = self._cover(kept, failed, others)
                totals = self._merge(chosen, kept)
            kept.failed = [row for unit, reason in failed.items() for row in self._rows_of(unit, reason)]
        self._check_once(kept, failed)
        kept.check()
        warn_of_several(self.what, kept.notes.devices)
        self._say_share(kept, failed)
        return totals, kept

    def _say_share(self, kept: Pass, failed: Mapping[int, str]) -> None:
        """How much of the run this driver has done, unless earlier runs had done it all."""
        if kept.num_units == kept.units_before:
            return
        here, theirs = int(kept.own.sum()), kept.num_units - kept.units_before - len(failed) - int(kept.own.sum())
        log.info(
            "%s: %s images in %s units were done by this driver%s", self.what, f"{kept.images_here:,}", f"{here:,}",
            f", {theirs:,} units by others" if theirs > 0 else "",
        )  # fmt: skip

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        """Where the pass fails before anything was committed, and nobody else is at work, leave no claim behind."""
        try:
            yield
        except Exception:
            with suppress(UserError):
                entries = self.folder.entries()
                if not self.folder.list(entries) and not any(driver_of(entry.path) for entry in entries):
                    remove_tree(self.folder.uri)
            raise

    def _check_once(self, kept: Pass, failed: dict[int, str]) -> None:
        """See that every unit was merged exactly once, and every image is accounted for."""
        wanted = [unit for unit in range(kept.num_units) if unit not in failed]
        images = kept.notes.images + len(kept.notes.bad) + len(kept.failed)
        if kept.notes.units != wanted or images != kept.num_images:
            raise RuntimeError(f"{len(kept.notes.units)} of {len(wanted)} units merged, {images} of {kept.num_images} images")

    def _others(self, driver: str) -> _Others:
        uri, peers = self.folder.uri, Peers(self.folder.uri)
        return _Others(Claims(uri, len(self.manifest.units), driver, peers), GivenUp(uri, driver, peers))

    def _cover(self, kept: Pass, failed: dict[int, str], others: _Others) -> list[Bundle]:
        """Run units until bundles hold all but those that were given up, by this driver and others. Returns the bundles.

        Args:
            kept: told what was done.
            failed: unit → why it was given up; filled.
            others: what is known of the other drivers.
        """
        chosen, missing = self._look(others, kept, failed)
        kept.units_before = min(kept.units_before, kept.num_units - len(missing))
        if kept.units_before:
            log.info("%s: %s units were done by earlier runs", self.what, f"{kept.units_before:,}")
        if not missing:
            return chosen
        waves = Waves(
            self.what, self.manifest, self.image_size, self.task, self.totals, self.session.plan, self.folder, self._where,
            self.no_progress_minutes, self.commit_seconds, self.session.tracker.metrics,
        )  # fmt: skip
        with waves:
            fruitless = 0
            while missing:
                waves.progress.elsewhere(self._done_elsewhere(missing, failed, kept))
                units, held = others.claims.split(missing)
                if units:
                    waves.progress.note("")
                    fruitless = 0 if self._run_wave(waves, units[:WAVE_UNITS], others, kept, failed) else fruitless + 1
                else:
                    self._wait(waves, held)
                if fruitless:
                    self._pause(fruitless, missing)
                chosen, missing = self._look(others, kept, failed)
        return chosen

    def _look(self, others: _Others, kept: Pass, failed: dict[int, str]) -> tuple[list[Bundle], list[int]]:
        """What is committed, and what is still to be run, by whomever; units that others have given up are not.

        Raises: UserError where another driver has finished the run, and taken the bundles away.
        """
        entries = self.folder.entries()
        others.claims.look(entries)
        given_up = others.given_up.look(entries)
        chosen = choose({*self.folder.list(entries), *kept.committed.values()})
        absent = uncovered(chosen, kept.num_units).tolist()
        for unit in set(failed).difference(absent):  # another driver has done it
            failed.pop(unit)
            kept.tally.forget(unit)
        for unit in sorted(set(given_up).intersection(absent).difference(failed)):
            self._give_up(unit, given_up[unit], kept, failed)
        missing = [unit for unit in absent if unit not in failed]
        if missing and not self.session.anew and self.session.folder.done_meanwhile():
            remove_tree(self.folder.uri)
            self._say_share(kept, failed)
            raise UserError(f"{self.what}: another driver has finished this run")
        return chosen, missing

    def _run_wave(self, waves: Waves, units: Sequence[int], others: _Others, kept: Pass, failed: dict[int, str]) -> bool:
        """Run units. Returns whether anything came of it."""
        before = len(kept.committed) + len(failed)
        for receipt in waves.run(units, others.claims.desk()):
            for unit, reason in receipt.failed:
                self._give_up(unit, reason, kept, failed)
                others.given_up.write(unit, reason)
            kept.take(receipt)
        return len(kept.committed) + len(failed) > before

    def _give_up(self, unit: int, reason: str, kept: Pass, failed: dict[int, str]) -> None:
        failed[unit] = reason
        kept.tally.add(unit, int(self._sizes[unit]), self._rows_of(unit, reason)[0])
        log.warning("%s: %s", self.what, reason)

    def _done_elsewhere(self, missing: list[int], failed: Mapping[int, str], kept: Pass) -> int:
        """Images of the units that earlier runs and other drivers have committed."""
        return int(self._sizes.sum() - self._sizes[[*missing, *failed]].sum() - self._sizes[kept.own].sum())

    def _pause(self, fruitless: int, missing: Sequence[int]) -> None:
        """After a wave of which nothing came: others were faster, or its work was lost.

        Raises: UserError where that has happened too often.
        """
        if fruitless >= MAX_FRUITLESS:
            raise UserError(
                f"{self.what}: unit {missing[0]} and {len(missing) - 1} more were run {fruitless} times, and nothing could be "
                "committed; what was committed before stays, and the same command goes on from there"
            )
        time.sleep(PAUSE_SECONDS * fruitless)

    def _wait(self, waves: Waves, held: Held) -> None:
        """Let others do what they have claimed, and say so in the lines of progress.

        Raises: UserError where nothing has been done for too long.
        """
        waves.progress.note(f"waiting for the other driver's {held.units:,} units (on {', '.join(held.hosts)})")
        waves.see_progress()
        time.sleep(PAUSE_SECONDS)

    def _rows_of(self, unit: int, reason: str) -> BadRows:
        found = self.manifest.units[unit]
        return [(found.start + index, path, reason) for index, path in enumerate(self.manifest.paths(found))]

    def _merge(self, chosen: Sequence[Bundle], kept: Pass) -> T | None:
        """All bundles in the order of their units; many of them first in a tree of tasks. None where some are gone."""
        start = time.perf_counter()
        totals, notes = self.totals(), Notes([], 0)
        patience = Patience(self.what, self.no_progress_minutes)
        try:
            for arrays, other in merged_contents(self.folder, self.totals, chosen, self._where, patience):
                totals.add(arrays)
                notes.add(other)
        except Exception as error:
            if not isinstance(user_error(error), NotFound) or not self._forget_gone(chosen, kept):
                raise
            return None
        kept.notes, kept.merge_seconds = notes, time.perf_counter() - start
        return totals

    def _forget_gone(self, chosen: Sequence[Bundle], kept: Pass) -> bool:
        """Whether bundles that were chosen are there no more; their units are to be run again."""
        there = {bundle.name for bundle in self.folder.list()}
        gone = [bundle for bundle in chosen if bundle.name not in there]
        for bundle in gone:
            kept.forget(bundle.name, int(self._sizes[list(bundle.units)].sum()))
        if gone:
            log.warning(
                "%s: %d committed bundles are gone, the first %s; they are made again", self.what, len(gone), gone[0].name
            )
        return bool(gone)
