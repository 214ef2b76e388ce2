"""What the pipeline itself costs: Ray beside a bare loop, a unit among few and among many, memory by the number of images.

    python tests/benchmarks/pipeline.py overhead|units|memory

overhead: units of 64 images and 0.5 s of compute each, images/s through the pipeline against decode and compute in a loop.
units: seconds a unit and the driver's peak memory at 50 and at 2,000 units of one tiny image.
memory: peaks of the driver and of an actor for 1,000 and for 20,000 images of the demo's size (28 by 28), each in a process
of its own, with the demo CLIP and random latents.
The last line is one JSON object. Needs the whole package, with Ray, which it starts and ends.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from patchsae_ray.data import manifest as manifests
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.stages import peak_bytes


class Totals:
    """Counts images."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, arrays: Arrays) -> None:
        self.count += int(arrays["count"][0])

    def to_arrays(self) -> Arrays:
        return {"count": np.array([self.count])}


class SleepingTask:
    """A unit takes a fixed time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(self, device: str) -> "SleepingTask":
        return self

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        time.sleep(self.seconds)
        return {"count": np.array([len(unit.positions)])}, {}


class NoTracker:
    def metrics(self, values: dict[str, float]) -> None:
        pass


def images(folder: Path, count: int, side: int = 28) -> Path:
    """One Parquet file of PNGs with labels."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": ""})
    path = folder / f"{count}.parquet"
    pq.write_table(pa.table({"image": rows, "label": [index % 10 for index in range(count)]}), path, row_group_size=512)
    return path


def units_of(path: Path, unit_size: int) -> Manifest:
    manifests.UNIT_SIZE = unit_size
    return open_dataset("bench", str(path), None, None)


def run_pass(manifest: Manifest, folder: Path, task: SleepingTask) -> float:
    """Seconds of a pass, Ray joined before and the pool's start among them."""
    from patchsae_ray.pipelines import cluster
    from patchsae_ray.pipelines.passes import UnitPass
    from patchsae_ray.pipelines.results import ResultFolder
    from patchsae_ray.pipelines.runner import Session

    results = ResultFolder(str(folder), "extract", {}, {"a.bin": "key"})
    session = Session(cluster.make_plan("cpu"), NoTracker(), results)  # type: ignore[arg-type]
    start = time.perf_counter()
    totals, _ = UnitPass("bench", manifest, 28, task, Totals, session, "key", 0.0, 30.0).run()
    assert totals.count == manifest.num_images
    return time.perf_counter() - start


def overhead(folder: Path) -> dict[str, float]:
    from patchsae_ray.pipelines import cluster

    manifest = units_of(images(folder, 64 * 60), 64)
    cluster.connect("local")
    run_pass(units_of(images(folder, 64), 64), folder / "warm", SleepingTask(0))
    empty = run_pass(units_of(images(folder, 64), 64), folder / "empty", SleepingTask(0))
    pipeline = run_pass(manifest, folder / "run", SleepingTask(0.5))
    start = time.perf_counter()
    for unit in manifest.units:
        decode_unit(unit, manifest.reading, 28)
        time.sleep(0.5)
    bare = time.perf_counter() - start
    return {
        "images_per_second": manifest.num_images / pipeline,
        "images_per_second_without_start": manifest.num_images / (pipeline - empty),
        "images_per_second_bare_loop": manifest.num_images / bare,
        "seconds_of_an_empty_pass": empty,
    }


def units(folder: Path) -> dict[str, float]:
    from patchsae_ray.pipelines import cluster

    found: dict[str, float] = {}
    cluster.connect("local")
    run_pass(units_of(images(folder, 1), 1), folder / "warm", SleepingTask(0))
    for count in (50, 2000):
        seconds = run_pass(units_of(images(folder, count), 1), folder / str(count), SleepingTask(0))
        found[f"seconds_per_unit_{count}"] = seconds / count
        found[f"driver_peak_mib_{count}"] = peak_bytes() / 2**20
    return found


def memory(folder: Path) -> dict[str, float]:
    import torch

    from patchsae_ray.sae.checkpoint import safetensors_bytes
    from patchsae_ray.sae.model import SparseAutoencoder, initialise

    sae = SparseAutoencoder(128, 1024)
    initialise(sae, torch.Generator().manual_seed(0))
    (folder / "sae.safetensors").write_bytes(safetensors_bytes(sae, {"model_name": "demo", "block_layer": -2}))
    found: dict[str, float] = {}
    for count in (1000, 20_000):
        root = folder / str(count)
        command = [
            sys.executable, str(ROOT / "jobs" / "extract.py"), "--root_dir", str(root), "--dataset_name", "bench",
            "--dataset_path", str(images(folder, count)), "--sae_path", str(folder / "sae.safetensors"),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        state = json.loads((root / "out/feature_data/base/bench/run.json").read_text())
        for who, peak in state["runs"]["extract"]["peak_memory_bytes"].items():
            found[f"{who}_peak_mib_{count}"] = peak / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["overhead", "units", "memory"])
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory() as folder:
        found = {"overhead": overhead, "units": units, "memory": memory}[what](Path(folder))
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
