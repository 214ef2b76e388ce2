"""What runs on the way from partials to one result: combining and committing a group, merging bundles, in tasks of Ray."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.measure.image_errors import ImageError
from patchsae_ray.pipelines.bundles import BadRows, Bundle, BundleFolder, Notes, pack, unpack
from patchsae_ray.pipelines.units import Totals

MERGE_FAN_IN = 32
"""Bundles that one task merges; the driver merges what is left when no more than these remain."""


@dataclass(frozen=True)
class Receipt:
    """What a combining task tells the driver."""

    committed: tuple[int, ...]
    """Units of the bundle, whoever committed it first."""
    bad: BadRows
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
    merged, all_notes = totals(), Notes([], 0)
    for arrays, notes in units:
        if not notes.failed:
            ImageError.raise_from(arrays)
            merged.add(arrays)
            all_notes.add(notes)
    if all_notes.units:
        arrays = merged.to_arrays()
        all_notes.seconds["combine"] = time.perf_counter() - start
        mark = time.perf_counter()
        folder.commit(arrays, all_notes)
        return Receipt(tuple(all_notes.units), all_notes.bad, failed, time.perf_counter() - mark)
    return Receipt((), [], failed)


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


def merged_contents(
    folder: BundleFolder, totals: type[Totals], chosen: Sequence[Bundle], scheduling: Any
) -> Iterator[tuple[Any, Notes]]:
    """At most `MERGE_FAN_IN` contents that hold all bundles, in the order of their units: themselves, or merged in tasks."""
    if len(chosen) <= MERGE_FAN_IN:
        return _read_ahead(folder, chosen)
    return map(unpack, _merge_in_tasks(folder, totals, chosen, scheduling))


def _merge_in_tasks(folder: BundleFolder, totals: type[Totals], chosen: Sequence[Bundle], scheduling: Any) -> Iterator[bytes]:
    """A tree of tasks, each merging up to `MERGE_FAN_IN`, until no more than that are left."""
    remote = ray.remote(num_cpus=0.5, max_retries=5, scheduling_strategy=scheduling)
    parts = [list(chosen[start : start + MERGE_FAN_IN]) for start in range(0, len(chosen), MERGE_FAN_IN)]
    merged = [remote(_merge_bundles).remote(folder, totals, part) for part in parts]
    while len(merged) > MERGE_FAN_IN:
        groups = [merged[start : start + MERGE_FAN_IN] for start in range(0, len(merged), MERGE_FAN_IN)]
        merged = [remote(_merge_packed).remote(totals, *group) for group in groups]
    for reference in merged:
        yield ray.get(reference)


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
