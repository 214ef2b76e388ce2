"""What the manifest of a folder costs an image: seconds, peak memory of the process that makes it, and bytes where it is kept.

    python tests/benchmarks/manifest.py [--images N] [--classes N] [--folder PATH]

A folder of N and one of 2 N empty files, in class folders (one class: in a single folder) on tmpfs, each listed in a process
of its own; the difference is what an image costs, without what a process weighs by itself. `reopened` is a process that
takes the kept manifest, as a cached worker does: edges, all labels, and 200 units by chance.
The last line is one JSON object, with what 10^7 images would take by the difference. Needs no Ray.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.kept import keep


def peak() -> int:
    """Bytes of this process's memory at its largest."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make(data: str, root: str) -> dict[str, float]:
    """List the folder and keep its manifest."""
    before, start, used = peak(), time.perf_counter(), time.process_time()
    manifest = keep(open_dataset("bench", data, None, None, root))
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    return {"images": manifest.num_images, **seconds, "peak": peak() - before}


def reopen(data: str, root: str) -> dict[str, float]:
    """Take the kept manifest and read some of it."""
    before, start = peak(), time.perf_counter()
    manifest = open_dataset("bench", data, None, None, root)
    opened = time.perf_counter() - start
    assert len(manifest.label_array()) == manifest.units.edges()[-1]
    start = time.perf_counter()
    for index in np.random.default_rng(0).integers(0, len(manifest.units), 200).tolist():
        manifest.units.read(index)
    a_unit = (time.perf_counter() - start) / 200
    return {"reopened_seconds": opened, "unit_milliseconds": 1e3 * a_unit, "reopened_peak": peak() - before}


def make_files(folder: Path, count: int, classes: int) -> None:
    for label in range(classes):
        inside = folder / f"n{label:08d}" if classes > 1 else folder
        inside.mkdir(parents=True)
        for number in range(label * count // classes, (label + 1) * count // classes):
            (inside / f"n{label:08d}_{number:08d}.JPEG").touch()


def measured(folder: Path, count: int, classes: int) -> dict[str, float]:
    data, root = folder / str(count), folder / f"root{count}"
    make_files(data, count, classes)
    time.sleep(2)  # a folder that is being written to is not trusted
    found: dict[str, float] = {}
    for step in ("make", "reopen"):
        command = [sys.executable, __file__, "--step", step, "--folder", str(data), "--root", str(root)]
        found.update(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    found["kept_bytes"] = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    print(json.dumps(found), file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--step", choices=["make", "reopen"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps({"make": make, "reopen": reopen}[given.step](given.folder, given.root)))
        return
    found = []
    for count in (given.images, 2 * given.images):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found.append(measured(Path(folder), count, given.classes))
    few, many = found
    an_image = {name: (many[name] - few[name]) / given.images for name in few if name != "images"}
    print(
        json.dumps(
            {
                "images": [given.images, 2 * given.images],
                "classes": given.classes,
                "microseconds_an_image": round(1e6 * an_image["seconds"], 2),
                "cpu_microseconds_an_image": round(1e6 * an_image["cpu_seconds"], 2),
                "peak_bytes_an_image": round(an_image["peak"], 1),
                "reopened_peak_bytes_an_image": round(an_image["reopened_peak"], 1),
                "kept_bytes_an_image": round(an_image["kept_bytes"], 1),
                "reopened_seconds": round(many["reopened_seconds"], 3),
                "unit_milliseconds": round(many["unit_milliseconds"], 2),
                "seconds_at_1e7": round(many["seconds"] + an_image["seconds"] * (1e7 - 2 * given.images), 1),
                "peak_mib_at_1e7": round((many["peak"] + an_image["peak"] * (1e7 - 2 * given.images)) / 2**20),
            }
        )
    )


if __name__ == "__main__":
    main()
