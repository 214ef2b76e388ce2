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
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.image_errors import ImageError
from patchsae_ray.measure.stages import peak_bytes
from patchsae_ray.pipelines.bundles import Notes, pack
from patchsae_ray.pipelines.decoding import Attempt, decoded_units
from patchsae_ray.pipelines.devices import device_name
from patchsae_ray.pipelines.planning import Plan
from patchsae_ray.pipelines.progress import Reporter


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
            with Attempt(self._ledger, "model", index, f"unit {index}") as failed:
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
