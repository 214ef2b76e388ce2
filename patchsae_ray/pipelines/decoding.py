"""The decode side of a pass through Ray Data: units' rows → pixels, in tasks on CPUs.

What a decode task imports is memory in each of a node's decoding processes, so neither torch nor open_clip is imported
here: a process stays near 30 MB of its own instead of 350.
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from patchsae_ray.data.manifest import UNIT_SIZE, Manifest
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.planning import Plan, store_bytes
from patchsae_ray.pipelines.ray_faults import MORE_MEMORY
from patchsae_ray.storage import patiently

MAX_DEATHS = 4
"""Processes that a unit may take with it before it is given up; Ray by itself would try without end."""


class Attempt:
    """An attempt at a piece of work, on record in the ledger while the `with` block runs.

    Args:
        ledger: an actor that keeps `Attempts`.
        stage: decode or model.
        key: of the piece, as `Attempts.begin` takes it.
        what: the piece in words.
        most: deaths after which it is not tried again.
    """

    deaths = 0
    """Processes that have died at the piece before, once the `with` block is entered."""

    def __init__(self, ledger: Any, stage: str, key: Hashable, what: str, most: int = MAX_DEATHS) -> None:
        self._ledger, self._stage, self._key, self._what, self._most = ledger, stage, key, what, most
        context = ray.get_runtime_context()
        self._place = (context.get_node_id(), context.get_worker_id())

    def __enter__(self) -> str:
        """Why the piece must not be tried again; empty where it may.

        Raises: UserError where its processes were ended for the memory of their machines: that is no fault of the piece.
        """
        self.deaths = int(ray.get(self._ledger.begin.remote(self._stage, self._key, *self._place)))
        if self.deaths < self._most:
            return ""
        if full := int(ray.get(self._ledger.ended_for_memory.remote(self._stage, self._key))):
            raise UserError(
                f"{self._what}: Ray ended {full} processes in '{self._stage}' because their machine's memory was nearly full; "
                f"{MORE_MEMORY}"
            )
        return f"{self._what} was given up: {self.deaths} processes died at it in '{self._stage}'"

    def __exit__(self, *error: object) -> None:
        self._ledger.end.remote(self._stage, self._key, *self._place)


class DecodeRow:
    """A unit's row → its pixels as one tensor cell, or nothing where the unit is another driver's."""

    def __init__(self, manifest: Manifest, image_size: int, ledger: Any) -> None:
        self._units, self._reading, self._image_size = manifest.units, manifest.reading, image_size
        self._ledger = ledger

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        index = int(row["unit"])
        if not ray.get(self._ledger.claim.remote(index)):
            return []
        with Attempt(self._ledger, "decode", index, f"unit {index}") as failed:
            return [self._given_up(index, failed) if failed else self._decode(index)]

    def _decode(self, index: int) -> dict[str, Any]:
        unit = self._units.read(index)
        decoded = patiently(lambda: decode_unit(unit, self._reading, self._image_size))
        return self._row(index, unit.count, decoded)

    def _given_up(self, index: int, failed: str) -> dict[str, Any]:
        nothing = np.zeros(0, np.int64)
        pixels = np.zeros((0, self._image_size, self._image_size, 3), np.uint8)
        return self._row(index, self._units.read(index).count, DecodedUnit(pixels, nothing, nothing, []), failed)

    def _row(self, index: int, count: int, decoded: DecodedUnit, failed: str = "") -> dict[str, Any]:
        header = {"bad": decoded.bad, "seconds": decoded.seconds, "failed": failed, "count": count}
        return {
            "index": index,
            "pixels": decoded.pixels,
            "positions": decoded.positions,
            "labels": decoded.labels,
            "header": json.dumps(header),
        }


@contextmanager
def fresh_context() -> Iterator[Any]:
    """A context of Ray Data for the data sets that are made in the `with` block: nothing of it reaches those made later."""
    context = ray.data.DataContext()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # ours looks inside the units
    with ray.data.DataContext.current(context):
        yield context


def decoded_units(manifest: Manifest, units: Sequence[int], image_size: int, plan: Plan, ledger: Any) -> Any:
    """A Ray Data set of decoded units by their indices, one row and one block each, in the order given.

    Units that are another driver's leave an empty block.
    """
    unit_bytes = UNIT_SIZE * image_size**2 * 3
    store = store_bytes(plan, unit_bytes, ray.cluster_resources().get("CPU", 0.0))
    with fresh_context() as context:
        context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=store)
        rows = ray.data.from_items([{"unit": int(unit)} for unit in units], override_num_blocks=len(units))
    return rows.flat_map(DecodeRow(manifest, image_size, ledger).__call__, num_cpus=plan.decode_cpus)
