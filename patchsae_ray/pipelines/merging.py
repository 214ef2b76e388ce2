"""What runs on the way from partials to one result: combining and committing a group, merging bundles, in tasks of Ray."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.measure.image_errors import ImageError
from patchsae_ray.pipelines.bundles import BadRow, Bundle, BundleFolder, Notes, pack, unpack
from patchsae_ray.pipelines.progress import Patience, on_this_machine
from patchsae_ray.pipelines.ray_faults import given_up
from patchsae_ray.pipelines.units import Totals

T = TypeVar("T")

MERGE_FAN_IN = 32
"""Bundles that one task merges; the driver merges what is left when no more than these remain."""


@dataclass(frozen=True)
class Receipt:
    """What a combining task tells the driver."""

    committed: tuple[int, ...]
    """Units of the bundle, whoever committed it first."""
    images: int
    """Of those units, unreadable ones too."""
    bad: tuple[tuple[int, int, BadRow], ...]
    """(unit, number of unreadable images, the first of them) of the units that have some."""
    failed: tuple[tuple[int, str], ...]
    """(unit, reason) of those that were given up."""
    commit_seconds: float = 0.0


def combine(folder: BundleFolder, totals: type[Totals], *blocks: Any) -> Receipt:
    """Merge partials and commit them as one bundle; runs as a Ray task.

    Raises: ImageError where a unit's worker met one.
    """
    start = time.perf_counter()
    units = sorted((unpack(data) for block in blocks for data in block["partial"].to_pylist()), key=lambda one: one[1].units)
    failed = tuple((notes.units[0], notes.failed) for _, notes in units if notes.failed)
    bad = tuple((notes.units[0], len(notes.bad), notes.bad[0]) for _, notes in units if notes.bad)
    merged, all_notes = totals(), Notes([], 0)
    for arrays, notes in units:
        if not notes.failed:
            ImageError.raise_from(arrays)
            merged.add(arrays)
            all_notes.add(notes)
    if not all_notes.units:
        return Receipt((), 0, (), failed)
    arrays = merged.to_arrays()
    all_notes.seconds["combine"] = time.perf_counter() - start
    mark = time.perf_counter()
    folder.commit(arrays, all_notes)
    images = all_notes.images + len(all_notes.bad)
    return Receipt(tuple(all_notes.units), images, bad, failed, time.perf_counter() - mark)


@contextmanager
def naming_the_image(manifest: Manifest) -> Iterator[None]:
    """Add the path to an ImageError, which comes out of a task wrapped by Ray; its position is one of this manifest's.

    Raises: UserError in its place.
    """
    try:
        yield
    except Exception as error:
        found = getattr(error, "cause", error)
        if type(found) is not ImageError:
            raise
        unit = manifest.units[manifest.units.at(found.position)]
        path = manifest.paths(unit)[found.position - unit.start]
        raise UserError(str(ImageError(found.position, found.said, path))) from error


def _read_ahead(folder: BundleFolder, chosen: Sequence[Bundle]) -> Iterator[tuple[Any, Notes]]:
    """Bundles in order, the next few read meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        ahead = deque(pool.submit(folder.read, bundle) for bundle in chosen[:2])
        for bundle in [*chosen[2:], None, None][: len(chosen)]:
            content = ahead.popleft().result()
            if bundle is not None:
                ahead.append(pool.submit(folder.read, bundle))
            yield content


@dataclass(frozen=True)
class Helpers:
    """Where small tasks run, and how many at once.

    Args:
        scheduling: Ray's strategy.
        combine_cpus: CPUs that a combining task takes; not 0 where machines without CPUs are to be left alone.
        merge_cpus: CPUs that a merging task takes.
        merges: merging tasks at once.
    """

    scheduling: Any
    combine_cpus: float
    merge_cpus: float
    merges: int


def helpers(local: bool) -> Helpers:
    """On this machine alone where only it sees the files, though Ray counts no CPU on it; else wherever there are CPUs."""
    if local:
        return Helpers(on_this_machine(), 0, 0, os.cpu_count() or 1)
    return Helpers("SPREAD", 0.001, 0.5, max(8, 2 * int(ray.cluster_resources().get("CPU", 0.0))))


def merged_contents(
    folder: BundleFolder, totals: type[Totals], chosen: Sequence[Bundle], where: Helpers, patience: Patience
) -> Iterator[tuple[Any, Notes]]:
    """At most `MERGE_FAN_IN` contents that hold all bundles, in the order of their units: themselves, or merged in tasks.

    Raises: UserError as `Patience.see`, or where Ray gives a task up.
    """
    if len(chosen) <= MERGE_FAN_IN:
        return _read_ahead(folder, chosen)
    return map(unpack, _merge_in_tasks(folder, totals, chosen, where, patience))


def _merge_in_tasks(
    folder: BundleFolder, totals: type[Totals], chosen: Sequence[Bundle], where: Helpers, patience: Patience
) -> Iterator[bytes]:
    """A tree of tasks, each merging up to `MERGE_FAN_IN`, until no more than that are left."""
    remote = ray.remote(num_cpus=where.merge_cpus, max_retries=5, scheduling_strategy=where.scheduling)
    merge_bundles, merge_packed = remote(_merge_bundles), remote(_merge_packed)
    merged = _in_turn(_groups(chosen), lambda part: merge_bundles.remote(folder, totals, part), where.merges, patience)
    while len(merged) > MERGE_FAN_IN:
        merged = _in_turn(_groups(merged), lambda group: merge_packed.remote(totals, *group), where.merges, patience)
    for reference in merged:
        _wait_for_one([reference], patience)
        try:
            yield ray.get(reference)
        except ray.exceptions.RayError as error:
            said = given_up(error, "the merging of bundles")
            if said is None:
                raise
            raise said from error


def _groups(items: Sequence[T]) -> list[list[T]]:
    return [list(items[start : start + MERGE_FAN_IN]) for start in range(0, len(items), MERGE_FAN_IN)]


def _in_turn(groups: Sequence[list[T]], submit: Callable[[list[T]], Any], most: int, patience: Patience) -> list[Any]:
    """A task for each group, no more than `most` of them at once; their references, in order."""
    submitted: list[Any] = []
    running: list[Any] = []
    for group in groups:
        if len(running) >= most:
            running = _wait_for_one(running, patience)
        submitted.append(submit(group))
        running.append(submitted[-1])
    return submitted


def _wait_for_one(running: list[Any], patience: Patience) -> list[Any]:
    """Wait until one of some tasks is done. Returns the others.

    Raises: UserError as `Patience.see`.
    """
    while True:
        done, others = ray.wait(running, num_returns=1, timeout=1.0, fetch_local=False)
        if done:
            patience.moved()
            return others
        patience.see(lambda: f"one of {len(running)} tasks that merge bundles")


def _merge_bundles(folder: BundleFolder, totals: type[Totals], bundles: Sequence[Bundle]) -> bytes:
    return _packed_sum(totals, _read_ahead(folder, bundles))


def _merge_packed(totals: type[Totals], *packed: bytes) -> bytes:
    return _packed_sum(totals, map(unpack, packed))


def _packed_sum(totals: type[Totals], contents: Iterable[tuple[Any, Notes]]) -> bytes:
    merged, notes = totals(), Notes([], 0)
    for arrays, other in contents:
        merged.add(arrays)
        notes.add(other)
    return pack(merged.to_arrays(), notes)
