"""Units through Ray Data: decode on CPUs → a pool of actors with the model → one partial result a unit.

A unit is one row whose pixels are one tensor cell; a partial is one block of bytes. What is in memory is what is in flight.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray
import torch

from patchsae_ray.data.manifest import Manifest, Unit
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import Arrays, from_bytes, to_bytes
from patchsae_ray.pipelines.cluster import Plan
from patchsae_ray.pipelines.progress import ProgressLines, Reporter

NO_PROGRESS_SECONDS = 6 * 3600
"""Without a finished unit for this long the run is given up; 512 images of a large ViT on a CPU may take hours."""

BadRows = list[tuple[int, str, str]]
"""(position, path, reason)."""


class UnitWorker(Protocol):
    """What runs inside an actor, with the model loaded."""

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> Arrays:
        """One unit → its partial result; `report` takes the number of images done so far."""
        ...


class UnitTask(Protocol):
    """What the driver sends to the actors."""

    def start(self, device: str) -> UnitWorker:
        """Load the model on the actor's device."""
        ...


@dataclass
class Partial:
    """One unit's result as it reaches the driver."""

    arrays: Arrays
    bad: BadRows
    seconds: dict[str, float]
    """Stage times of this unit."""
    peak_bytes: int
    """Peak resident memory of the actor so far."""


class StageTimer:
    """Seconds by stage; on a GPU each mark waits for the device, so that a stage is charged what it used."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        """Charge the time since the last mark to `stage`."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


class _Actor:
    """One row in, one partial out; runs in a process of its own."""

    def __init__(self, task: "ray.ObjectRef[UnitTask]", plan: Plan, progress: Any) -> None:
        torch.set_num_threads(plan.threads)
        self._worker = ray.get(task).start(plan.device)
        self._reporter = Reporter(progress)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        if len(row["index"]) != 1:
            raise ValueError(f"an actor takes one unit at a time, got {len(row['index'])}")
        index = int(row["index"][0])
        header = json.loads(row["header"][0])
        unit = DecodedUnit(row["pixels"][0], row["positions"][0], row["labels"][0], header["bad"], header["seconds"])
        arrays = self._worker.process(unit, lambda images: self._reporter.report(index, images))
        self._reporter.report(index, len(unit.positions) + len(unit.bad), final=True)
        return {"partial": [_pack(arrays, unit)]}


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes (getrusage counts kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _pack(arrays: Arrays, unit: DecodedUnit) -> bytes:
    header = json.dumps({"bad": unit.bad, "seconds": unit.seconds, "peak_bytes": peak_bytes()}).encode()
    return to_bytes({**arrays, "header": np.frombuffer(header, dtype=np.uint8)})


def _unpack(data: bytes) -> Partial:
    arrays = from_bytes(data)
    header = json.loads(arrays.pop("header").tobytes())
    bad = [(int(position), str(path), str(reason)) for position, path, reason in header["bad"]]
    return Partial(arrays, bad, header["seconds"], header["peak_bytes"])


class DecodeRow:
    """A unit's row → its pixels as one tensor cell."""

    def __init__(self, manifest: Manifest, image_size: int) -> None:
        self._reading, self._image_size = manifest.reading, image_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = Unit.from_json(row["unit"])
        decoded = decode_unit(unit, self._reading, self._image_size)
        return {
            "index": unit.index,
            "pixels": decoded.pixels,
            "positions": decoded.positions,
            "labels": decoded.labels,
            "header": json.dumps({"bad": decoded.bad, "seconds": decoded.seconds}),
        }


def decoded_units(manifest: Manifest, units: Sequence[Unit], image_size: int, plan: Plan) -> Any:
    """A Ray Data set of decoded units, one row and one block each, in the order given."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    rows = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    return rows.map(DecodeRow(manifest, image_size).__call__, num_cpus=plan.decode_cpus)


def stream_partials(what: str, manifest: Manifest, image_size: int, task: UnitTask, plan: Plan) -> Iterator[Partial]:
    """Every unit's partial, as they are done, in any order.

    Args:
        what: the job's name in progress lines.
        manifest: the images.
        image_size: side of the decoded pixels.
        task: what the actors run; it goes through the object store once.
        plan: who gets what.
    """
    with ProgressLines(what, manifest.num_images) as progress:
        actors = min(plan.actors, len(manifest.units))
        partials = decoded_units(manifest, manifest.units, image_size, plan).map_batches(
            _Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus or None,
            fn_constructor_args=(ray.put(task), plan, progress.meter),
        )
        for batch in partials.iter_batches(batch_size=None, prefetch_batches=0):
            for data in batch["partial"]:
                yield _unpack(bytes(data))


@dataclass
class Pass:
    """What every pass over a data set keeps beside its own results."""

    max_bad_fraction: float
    num_images: int
    bad: BadRows = field(default_factory=list)
    actor_peak_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def take(self, partial: Partial) -> None:
        """Add a partial's bad rows and times.

        Raises: UserError once more images are unreadable than the settings allow.
        """
        self.bad.extend(partial.bad)
        self.actor_peak_bytes = max(self.actor_peak_bytes, partial.peak_bytes)
        for stage, seconds in partial.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.check()

    def check(self) -> None:
        """Raises: UserError once more images are unreadable than the settings allow."""
        if len(self.bad) > self.max_bad_fraction * self.num_images:
            _, path, reason = self.bad[0]
            raise UserError(
                f"{len(self.bad)} of {self.num_images} images cannot be read, the first {path} ({reason}); "
                f"--max_bad_fraction {self.max_bad_fraction:g} allows {int(self.max_bad_fraction * self.num_images)}"
            )

    def record(self) -> dict[str, Any]:
        """What run.json says of any pass."""
        return {
            "num_images": self.num_images,
            "bad_images": len(self.bad),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "wall_seconds": round(self.wall_seconds(), 3),
            "peak_memory_bytes": {"actor": self.actor_peak_bytes, "driver": peak_bytes()},
        }

    def wall_seconds(self) -> float:
        """Seconds since the pass began."""
        return time.perf_counter() - self.started
