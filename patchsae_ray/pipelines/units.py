"""Units through Ray Data: decode on CPUs → a pool of actors with the model → one partial result a unit.

A unit is one row whose pixels are one tensor cell; a partial is one block of bytes. What is in memory is what is in flight.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import ray
import torch

from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.image_errors import ImageError
from patchsae_ray.measure.stages import peak_bytes
from patchsae_ray.pipelines.bundles import Notes, pack
from patchsae_ray.pipelines.cluster import Plan
from patchsae_ray.pipelines.devices import device_name
from patchsae_ray.pipelines.progress import Reporter
from patchsae_ray.storage import patiently

MAX_DEATHS = 4
"""Processes that a unit may take with it before it is given up; Ray by itself would try without end."""


class UnitWorker(Protocol):
    """What runs inside an actor, with the model loaded."""

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """One unit → its partial result and stage times; `report` takes the number of images done so far.

        Raises: ImageError for an image with which the whole pass cannot go on.
        """
        ...


class Totals(Protocol):
    """What partial results are merged in; made without arguments."""

    def add(self, arrays: Arrays) -> None:
        """Take in a partial result, or another's `to_arrays`."""
        ...

    def to_arrays(self) -> Arrays:
        """All that was taken in, for `add`."""
        ...


class UnitTask(Protocol):
    """What the driver sends to the actors."""

    def start(self, device: str) -> UnitWorker:
        """Load the model on the actor's device."""
        ...


class Attempt:
    """An attempt at a unit, on record in the ledger while the `with` block runs."""

    def __init__(self, ledger: Any, stage: str, unit: int) -> None:
        self._ledger, self._stage, self._unit = ledger, stage, unit

    def __enter__(self) -> str:
        """Why the unit must not be tried again; empty where it may."""
        deaths = int(ray.get(self._ledger.begin.remote(self._stage, self._unit)))
        if deaths < MAX_DEATHS:
            return ""
        return f"unit {self._unit} was given up: {deaths} processes died at it in '{self._stage}'"

    def __exit__(self, *error: object) -> None:
        self._ledger.end.remote(self._stage, self._unit)


class _Actor:
    """One row in, one partial out; runs in a process of its own."""

    def __init__(self, task: "ray.ObjectRef[UnitTask]", plan: Plan, ledger: Any) -> None:
        torch.set_num_threads(plan.threads)
        self._worker, self._device = ray.get(task).start(plan.device), device_name(plan.device)
        self._ledger, self._reporter = ledger, Reporter(ledger)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        if len(row["index"]) != 1:
            raise ValueError(f"an actor takes one unit at a time, got {len(row['index'])}")
        index = int(row["index"][0])
        header = json.loads(row["header"][0])
        unit = DecodedUnit(row["pixels"][0], row["positions"][0], row["labels"][0], header["bad"], header["seconds"], index)
        notes = Notes([index], len(unit.positions), unit.bad, unit.seconds, failed=header["failed"], devices=[self._device])
        arrays: Arrays = {}
        if not notes.failed:
            with Attempt(self._ledger, "model", index) as failed:
                notes.failed = failed
                if not failed:
                    try:
                        arrays, seconds = self._worker.process(unit, lambda images: self._reporter.report(index, images))
                        notes.seconds.update(seconds)
                    except ImageError as error:  # said by the partial result, and raised where it is combined
                        arrays = error.to_arrays()
        notes.peak_bytes = peak_bytes()
        self._reporter.report(index, header["count"], final=True)
        return {"partial": [pack(arrays, notes)]}


class DecodeRow:
    """A unit's row → its pixels as one tensor cell."""

    def __init__(self, manifest: Manifest, image_size: int, ledger: Any) -> None:
        self._units, self._reading, self._image_size = manifest.units, manifest.reading, image_size
        self._ledger = ledger

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        index = int(row["unit"])
        with Attempt(self._ledger, "decode", index) as failed:
            return self._given_up(index, failed) if failed else self._decode(index)

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


def prepare_context() -> Any:
    """Ray Data's context of this process, as our pipelines want it."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # ours looks inside the units
    return context


def decoded_units(manifest: Manifest, units: Sequence[int], image_size: int, plan: Plan, ledger: Any) -> Any:
    """A Ray Data set of decoded units by their indices, one row and one block each, in the order given."""
    prepare_context()
    rows = ray.data.from_items([{"unit": int(unit)} for unit in units], override_num_blocks=len(units))
    return rows.map(DecodeRow(manifest, image_size, ledger).__call__, num_cpus=plan.decode_cpus)


def partials(
    manifest: Manifest, units: Sequence[int], image_size: int, task: "ray.ObjectRef[UnitTask]", plan: Plan, ledger: Any
) -> Any:
    """A Ray Data set of the units' partials, one block each, in any order.

    Args:
        manifest: the images.
        units: indices of the units.
        image_size: side of the decoded pixels.
        task: what the actors run.
        plan: who gets what.
        ledger: told what is tried and done.
    """
    low, high = min(plan.min_actors, len(units)), min(plan.max_actors, len(units))
    return decoded_units(manifest, units, image_size, plan, ledger).map_batches(
        _Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, initial_size=low),
        num_cpus=plan.actor_cpus,
        num_gpus=plan.actor_gpus or None,
        fn_constructor_args=(task, plan, ledger),
    )
