"""A pass over a data set that loses nothing: only units that no bundle holds are run, and each is committed once.

Partials stay in Ray's object store; the driver groups references to them, a task combines and commits each group, and the
driver gets a receipt. So the driver's memory depends neither on the number of images nor on the size of a partial.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import ray

from patchsae_ray import storage
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.measure.stages import peak_bytes
from patchsae_ray.pipelines.arrivals import Arrivals
from patchsae_ray.pipelines.bundles import (
    MAX_UNITS,
    BadRows,
    Bundle,
    BundleFolder,
    Heartbeat,
    Notes,
    choose,
    uncovered,
)
from patchsae_ray.pipelines.cluster import several_machines
from patchsae_ray.pipelines.devices import warn_of_several
from patchsae_ray.pipelines.merging import Receipt, combine, merged_contents, naming_the_image
from patchsae_ray.pipelines.progress import ProgressLines, duration, on_this_machine, start_ledger
from patchsae_ray.pipelines.runner import Session
from patchsae_ray.pipelines.units import Totals, UnitTask, partials

log = logging.getLogger(__name__)

COMBINES_AT_ONCE = 4
WAVE_UNITS = 20_000
"""Units that Ray Data is told of at once, so that what it keeps of each stays small."""
MAX_ROUNDS = 5
"""How often units that turn out to be uncovered are run again."""

T = TypeVar("T", bound=Totals)


@dataclass
class Pass:
    """What every pass over a data set keeps beside its own results."""

    max_bad_fraction: float
    num_images: int
    num_units: int = 0
    units_before: int = 0
    """Units that earlier runs had committed."""
    images_before: int = 0
    """Images of those units."""
    notes: Notes = field(default_factory=lambda: Notes([], 0))
    failed: BadRows = field(default_factory=list)
    """The images of units that were given up."""
    commit_seconds: float = 0.0
    """Of this run's bundles; the other stages are those of all runs together."""
    merge_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def bad(self) -> BadRows:
        """All images without a result, by position."""
        return sorted([*self.notes.bad, *self.failed])

    def check(self) -> None:
        """Raises: UserError once more images are unreadable than the settings allow."""
        bad = self.bad
        if len(bad) > self.max_bad_fraction * self.num_images:
            _, path, reason = bad[0]
            raise UserError(
                f"{len(bad)} of {self.num_images} images cannot be read, the first {path} ({reason}); "
                f"--max_bad_fraction {self.max_bad_fraction:g} allows {int(self.max_bad_fraction * self.num_images)}"
            )

    def record(self) -> dict[str, Any]:
        """What run.json says of any pass."""
        return {
            "num_images": self.num_images,
            "num_units": self.num_units,
            "units_by_earlier_runs": self.units_before,
            "bad_images": len(self.bad),
            "devices": self.notes.devices,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds().items()},
            "wall_seconds": round(self.wall_seconds(), 3),
            "peak_memory_bytes": {"actor": self.notes.peak_bytes, "driver": peak_bytes()},
        }

    def images_per_second(self) -> float:
        """Of the images that this run did itself."""
        return (self.num_images - self.images_before) / self.wall_seconds()

    def seconds(self) -> dict[str, float]:
        """Stage times, over all actors and tasks."""
        return {**self.notes.seconds, "commit": self.commit_seconds, "merge": self.merge_seconds}

    def wall_seconds(self) -> float:
        """Seconds since the pass began."""
        return time.perf_counter() - self.started


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
        uri = storage.absolute(storage.join(self.session.folder.uri, "bundles", self.run_key))
        self._scheduling: Any = "SPREAD"
        if storage.is_local(uri):  # then the other machines, if there are any, see neither the manifest nor the bundles
            self._scheduling = on_this_machine()
            if several_machines():
                self.manifest = replace(self.manifest, units=self.manifest.units.in_memory())
        self.folder = BundleFolder(uri, len(self.manifest.units))
        self._heartbeat = Heartbeat(uri)

    def run(self) -> tuple[T, Pass]:
        """Run what no bundle holds, then merge all bundles.

        Raises: UserError past `max_bad_fraction`, without progress, where the store stays away, or for an image that spoils it.
        """
        kept = Pass(self.max_bad_fraction, self.manifest.num_images, len(self.manifest.units))
        chosen = choose(self.folder.list())
        missing: list[int] = uncovered(chosen, kept.num_units).tolist()
        kept.units_before = kept.num_units - len(missing)
        edges = self.manifest.units.edges()
        kept.images_before = kept.num_images - sum(int(edges[unit + 1] - edges[unit]) for unit in missing)
        log.info("%s: %s images in %s units", self.what, f"{kept.num_images:,}", f"{kept.num_units:,}")
        if kept.units_before:
            log.info("%s: %s units were done by earlier runs", self.what, f"{kept.units_before:,}")
        try:
            failed: dict[int, str] = {}
            for _ in range(MAX_ROUNDS):
                if not missing:
                    break
                with naming_the_image(self.whole or self.manifest):
                    failed.update(self._run_units(missing, kept))
                chosen = choose(self.folder.list())
                absent = uncovered(chosen, kept.num_units).tolist()
                missing = [unit for unit in absent if unit not in failed]
                failed = {unit: failed[unit] for unit in absent if unit in failed}  # another driver may have done the rest
            if missing:
                raise UserError(f"{self.what}: unit {missing[0]} and {len(missing) - 1} more are in no bundle; run it again")
            kept.failed = [row for unit, reason in failed.items() for row in self._rows_of(unit, reason)]
            totals = self._merge(chosen, kept)
        finally:
            self._heartbeat.stop()
        self._check_once(kept, failed)
        kept.check()
        warn_of_several(self.what, kept.notes.devices)
        return totals, kept

    def _check_once(self, kept: Pass, failed: dict[int, str]) -> None:
        """See that every unit was merged exactly once, and every image is accounted for."""
        wanted = [unit for unit in range(kept.num_units) if unit not in failed]
        images = kept.notes.images + len(kept.notes.bad) + len(kept.failed)
        if kept.notes.units != wanted or images != kept.num_images:
            raise RuntimeError(f"{len(kept.notes.units)} of {len(wanted)} units merged, {images} of {kept.num_images} images")

    def _run_units(self, missing: Sequence[int], kept: Pass) -> dict[int, str]:
        """Run units in waves. Returns those that were given up, with the reason."""
        task = ray.put(self.task)
        ledger = start_ledger(kept.num_units)
        failed: dict[int, str] = {}
        with ProgressLines(
            self.what, kept.num_images, kept.images_before, ledger, publish=lambda found: self.session.tracker.metrics(found)
        ) as progress:
            for start in range(0, len(missing), WAVE_UNITS):
                wave = missing[start : start + WAVE_UNITS]
                data = partials(self.manifest, wave, self.image_size, task, self.session.plan, ledger)
                with Arrivals(data) as arrivals:
                    for receipt in self._receipts(arrivals, progress):
                        kept.notes.bad = sorted({*kept.notes.bad, *receipt.bad})
                        kept.commit_seconds += receipt.commit_seconds
                        for unit, reason in receipt.failed:
                            failed[unit] = reason
                            kept.failed += self._rows_of(unit, reason)
                            log.warning("%s: %s", self.what, reason)
                        kept.check()
        ray.kill(ledger)
        return failed

    def _rows_of(self, unit: int, reason: str) -> BadRows:
        found = self.manifest.units[unit]
        return [(found.start + index, path, reason) for index, path in enumerate(self.manifest.paths(found))]

    def _receipts(self, arrivals: Arrivals, progress: ProgressLines) -> Iterator[Receipt]:
        """Group partials as they come, have each group committed, and give the receipts as they come back."""
        remote = ray.remote(num_cpus=0, max_retries=5, scheduling_strategy=self._scheduling)(combine)
        waiting: list[Any] = []
        oldest = time.monotonic()
        running: list[Any] = []
        for reference in self._ticking(arrivals, progress):
            if reference is not None:
                oldest = oldest if waiting else time.monotonic()
                waiting.append(reference)
            if waiting and (len(waiting) >= MAX_UNITS or time.monotonic() - oldest >= self.commit_seconds):
                running.append(remote.remote(self.folder, self.totals, *waiting))
                waiting = []
            done, running = ray.wait(running, num_returns=len(running), timeout=0) if running else ([], [])
            while len(running) > COMBINES_AT_ONCE:
                more, running = ray.wait(running, num_returns=1)
                done += more
            for one in done:
                yield ray.get(one)
                progress.moved()
        if waiting:
            running.append(remote.remote(self.folder, self.totals, *waiting))
        for one in running:
            yield ray.get(one)
            progress.moved()

    def _ticking(self, arrivals: Arrivals, progress: ProgressLines) -> Iterator[Any]:
        """References to partials as they come, and None each second without one.

        Raises: UserError where nothing has been done for too long.
        """
        while True:
            self._heartbeat.beat()
            try:
                reference = arrivals.next(timeout=1.0)
            except StopIteration:
                return
            if reference is not None:
                progress.moved()
            elif progress.quiet_seconds() > 60 * self.no_progress_minutes:
                raise UserError(
                    f"{self.what}: nothing was done for {duration(progress.quiet_seconds())} "
                    "(--no_progress_minutes); what was committed stays, and the same command goes on from there"
                )
            yield reference

    def _merge(self, chosen: Sequence[Bundle], kept: Pass) -> T:
        """All bundles in the order of their units; many of them first in a tree of tasks."""
        start = time.perf_counter()
        totals, notes = self.totals(), Notes([], 0)
        for arrays, other in merged_contents(self.folder, self.totals, chosen, self._scheduling):
            totals.add(arrays)
            notes.add(other)
            self._heartbeat.beat()
        kept.notes, kept.merge_seconds = notes, time.perf_counter() - start
        return totals
