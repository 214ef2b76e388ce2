"""The same result for any workers, after kills, from two drivers, on a real S3 server that goes away."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from patchsae_ray import storage
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.manifest import UNIT_SIZE, Manifest
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.pipelines import cluster, merging, passes
from patchsae_ray.pipelines.passes import UnitPass
from patchsae_ray.pipelines.results import ResultFolder
from patchsae_ray.pipelines.runner import Session
from tests.benchmarks.pipeline import NoTracker, Totals
from tests.conftest import ROOT, JobRunner, RayHead, S3Server, golden_flags, golden_model_flags
from tests.data.makers import parquet_bytes, write
from tests.pipelines.commands import start, wait_for

pytestmark = pytest.mark.ray

IMAGES = 4 * UNIT_SIZE + 100
RESULTS = [
    "cls_sae_cnt.npy", "max_activating_image_indices.pt", "max_activating_image_label_indices.pt",
    "max_activating_image_values.pt", "sae_activation_histogram.npy", "sae_mean_acts.pt", "sae_mean_acts_cls.pt",
    "sae_mean_acts_patch.pt", "sae_sparsity.pt", "sae_sparsity_cls.pt", "sae_sparsity_patch.pt", "errors.parquet",
]  # fmt: skip
EXTRA = ["--figure_latents", "0", "--quality_images", "100", "--commit_seconds", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    labels = [number * 3 // IMAGES for number in range(IMAGES)]
    path.write_bytes(parquet_bytes(list(range(IMAGES)), list(labels), row_group_size=UNIT_SIZE))
    return path


def flags_of(data: str) -> list[str]:
    return ["--dataset_name", "many", "--dataset_path", data, *golden_model_flags(), *EXTRA]


def results(root: str) -> dict[str, str]:
    """File → digest of its bytes; `torch.save` and `numpy.save` write equal bytes for equal tensors."""
    folder = storage.join(root, "out/feature_data/base/many")
    return {name: hashlib.sha256(storage.read_bytes(storage.join(folder, name))).hexdigest() for name in RESULTS}


def record(root: str) -> dict[str, object]:
    found = json.loads(storage.read_text(storage.join(root, "out/feature_data/base/many/run.json")))["runs"]["extract"]
    return dict(found)


@pytest.fixture(scope="module")
def undisturbed(run_command: JobRunner, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed")
    done = run_command("extract", root, *flags_of(str(data)), "--workers", "1")
    assert done.code == 0, done.err
    assert record(str(root))["num_units"] == 5
    return results(str(root))


def bundles(root: str) -> list[str]:
    found = storage.entries(storage.join(root, "out/feature_data/base/many"))
    return [entry.path for entry in found if entry.path.endswith(".bundle")]


def test_three_workers_and_smaller_decode_give_the_same(
    run_command: JobRunner, data: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    done = run_command("extract", tmp_path, *flags_of(str(data)), "--workers", "1:3", "--decode_cpus", "0.25")
    assert done.code == 0, done.err
    assert "1 to 3 cpu actors" in done.out
    assert results(str(tmp_path)) == undisturbed


def test_a_killed_driver_loses_only_what_was_not_committed(
    ray_head: RayHead, ready_mlflow: Path, run_command: JobRunner, data: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    job = start(ray_head, ready_mlflow, tmp_path / "first", root, *flags_of(str(data)))
    wait_for(lambda: bundles(root))
    job.send_signal(signal.SIGKILL)
    job.wait(10)
    assert not (tmp_path / "root/out/feature_data/base/many/run.json").exists()
    done = run_command("extract", Path(root), *flags_of(str(data)))
    assert done.code == 0, done.err
    assert "units were done by earlier runs" in done.out
    assert int(str(record(root)["units_by_earlier_runs"])) >= 1
    assert results(root) == undisturbed
    assert not bundles(root), "bundles go once the results are committed"


def steer_results(root: Path) -> dict[str, bytes]:
    folder = root / "eval_outputs" / "base" / "many"
    tables = ["metrics.csv", "metrics_random.csv", "summary.json", "predictions.parquet", "errors.parquet"]
    return {name: (folder / name).read_bytes() for name in tables}


def test_a_killed_steering_goes_on_and_no_number_of_workers_matters(
    ray_head: RayHead, ready_mlflow: Path, run_command: JobRunner, data: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["one", "two", "three"]))
    ranking = ["--rank_by", "image,random:2", "--predictions", "--commit_seconds", "0", "--topk", "5,50,all"]
    flags = ["--dataset_name", "many", "--dataset_path", str(data), *golden_model_flags(), "--classnames", str(names), *ranking]
    job = start(ray_head, ready_mlflow, tmp_path / "first", str(tmp_path / "killed"), *flags, job="steer")
    wait_for(lambda: list(tmp_path.glob("killed/eval_outputs/base/many/bundles/*/*.bundle")))
    job.send_signal(signal.SIGKILL)
    job.wait(10)
    resumed = run_command("steer", tmp_path / "killed", *flags, "--workers", "1")
    assert resumed.code == 0, resumed.err
    assert "units were done by earlier runs" in resumed.out
    undisturbed = run_command("steer", tmp_path / "whole", *flags, "--workers", "3", "--decode_cpus", "0.25")
    assert undisturbed.code == 0, undisturbed.err
    assert steer_results(tmp_path / "killed") == steer_results(tmp_path / "whole")


def test_two_drivers_at_once_make_one_result(
    ray_head: RayHead, ready_mlflow: Path, data: Path, undisturbed: dict[str, str], s3_server: S3Server, tmp_path: Path
) -> None:
    root = "s3://bucket/two"
    jobs = [
        start(ray_head, ready_mlflow, tmp_path / str(i), root, *flags_of(str(data)), "--decode_cpus", "0.25") for i in (0, 1)
    ]
    for index, job in enumerate(jobs):
        assert job.wait(300) == 0, (tmp_path / str(index) / "err").read_text()
    assert results(root) == undisturbed
    images = [images_done((tmp_path / str(index) / "out").read_text()) for index in (0, 1)]
    assert IMAGES <= sum(images) <= 1.15 * IMAGES, "they share the units"


def test_of_two_different_runs_at_once_one_is_refused_and_says_whose_the_folder_is(
    ray_head: RayHead, ready_mlflow: Path, tmp_path: Path
) -> None:
    root, values = str(tmp_path / "root"), ["0.2", "0.3"]
    flags = [*golden_flags(), "--quality_images", "0", "--figure_latents", "0", "--threshold"]
    jobs = [start(ray_head, ready_mlflow, tmp_path / value, root, *flags, value) for value in values]
    codes = [job.wait(300) for job in jobs]
    errors = [(tmp_path / value / "err").read_text() for value in values]
    assert sorted(codes) == [0, 2], errors
    won, lost = codes.index(0), codes.index(2)
    assert f"is another run's (threshold {values[won]} there, {values[lost]} here)" in errors[lost]
    state = json.loads((tmp_path / "root/out/feature_data/base/golden/run.json").read_text())
    assert state["runs"]["extract"]["identity"]["threshold"] == values[won]


def images_done(out: str) -> int:
    """Images that a driver has run itself, as it says at the end of its pass."""
    found = re.search(r"extract: ([\d,]+) images in [\d,]+ units were done by this driver", out)
    return int(found[1].replace(",", "")) if found else 0


def test_on_s3_with_the_server_killed_in_mid_run(
    ray_head: RayHead, ready_mlflow: Path, data: Path, undisturbed: dict[str, str], s3_server: S3Server, tmp_path: Path
) -> None:
    write("s3://bucket/data/rows.parquet", data.read_bytes())
    root = "s3://bucket/run"
    job = start(ray_head, ready_mlflow, tmp_path / "first", root, *flags_of("s3://bucket/data/rows.parquet"))
    wait_for(lambda: bundles(root))
    s3_server.kill()
    time.sleep(3)
    assert job.poll() is None, "the job had ended before the server was killed"
    s3_server.start()
    assert job.wait(300) == 0, (tmp_path / "first" / "err").read_text()
    assert results(root) == undisturbed
    again = start(ray_head, ready_mlflow, tmp_path / "again", root, *flags_of("s3://bucket/data/rows.parquet"))
    assert again.wait(100) == 0
    assert "already finished" in (tmp_path / "again" / "out").read_text()
    assert "Ray:" not in (tmp_path / "again" / "out").read_text(), "no cluster is joined"


@pytest.mark.usefixtures("s3_server")
def test_wrong_credentials_and_a_missing_bucket_say_so_at_once(data: Path, tmp_path: Path) -> None:
    def refused(root: str, source: str, **environment: str) -> str:
        command = [sys.executable, str(ROOT / "jobs" / "extract.py"), "--root_dir", root, *flags_of(source)]
        done = subprocess.run(
            command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "no such bucket: s3://nowhere/run" in refused("s3://nowhere/run", str(data))
    wrong = refused("s3://bucket/x", "s3://bucket/data", AWS_SECRET_ACCESS_KEY="wrong")
    assert "no permission for s3://bucket" in wrong
    assert "s3://nowhere/data is not there" in refused(str(tmp_path / "root"), "s3://nowhere/data")


@pytest.mark.usefixtures("s3_server")
def test_clean_removes_what_dead_runs_left(run_command: JobRunner, tmp_path: Path) -> None:
    dead = tmp_path / "out/feature_data/base/many/bundles/dead"
    young = tmp_path / "out/feature_data/base/many/bundles/young"
    for folder in (dead, young):
        write(str(folder / "0000000000.1-1.bundle"), b"x" * 100)
        write(str(folder / "alive-12.json"), b"{}")
    write(str(dead.parent.parent / ".writing-run.json.abc"), b"{")
    for path in (*dead.iterdir(), dead.parent.parent / ".writing-run.json.abc"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    done = run_command("extract", tmp_path, "--clean")
    assert done.code == 0, done.err
    assert "removed" in done.out
    assert "2 files of 3 units" in done.out
    assert "2 leftovers removed" in done.out
    assert not dead.exists()
    assert sorted(path.name for path in young.iterdir()) == ["0000000000.1-1.bundle", "alive-12.json"]


class FaultyTask:
    """Counts images; ends its process at one unit, or stops there for good."""

    def __init__(self, dies_at: int = -1, hangs_at: int = -1) -> None:
        self.dies_at, self.hangs_at = dies_at, hangs_at

    def start(self, device: str) -> "FaultyTask":
        return self

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        if unit.positions[0] // UNIT_SIZE == self.dies_at:
            os._exit(1)
        if unit.positions[0] // UNIT_SIZE == self.hangs_at:
            time.sleep(3600)
        return {"count": np.array([len(unit.positions)])}, {}


@pytest.fixture
def joined(ray_head: RayHead) -> Iterator[None]:
    cluster.connect(ray_head.address)
    yield
    ray.shutdown()


def counting_pass(manifest: Manifest, folder: Path, task: FaultyTask, **limits: float) -> UnitPass[Totals]:
    session = Session(cluster.make_plan("cpu"), NoTracker(), ResultFolder(str(folder), "extract", {}, {"a.bin": "key"}))
    given = {"max_bad_fraction": 0.5, "no_progress_minutes": 5.0, **limits}
    return UnitPass("count", manifest, 16, task, Totals, session, "key", **given)


@pytest.mark.usefixtures("joined")
def test_a_unit_that_kills_its_actor_is_named_and_the_rest_done(data: Path, tmp_path: Path) -> None:
    manifest = open_dataset("many", str(data), None, None)
    totals, kept = counting_pass(manifest, tmp_path, FaultyTask(dies_at=1)).run()
    assert totals.count == IMAGES - UNIT_SIZE
    assert [position for position, _, _ in kept.bad] == list(range(UNIT_SIZE, 2 * UNIT_SIZE))
    assert kept.bad[0][2] == "unit 1 was given up: 4 processes died at it in 'model'"
    assert kept.bad[0][1] == f"{data}#{UNIT_SIZE}"
    again, mended = counting_pass(manifest, tmp_path, FaultyTask()).run()
    assert again.count == IMAGES
    assert (mended.units_before, mended.bad) == (4, [])


@pytest.mark.usefixtures("joined")
def test_waves_and_the_merge_tree(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "WAVE_UNITS", 2)
    monkeypatch.setattr(merging, "MERGE_FAN_IN", 2)
    manifest = open_dataset("many", str(data), None, None)
    totals, kept = counting_pass(manifest, tmp_path, FaultyTask(), commit_seconds=0.0).run()
    assert len(list(tmp_path.rglob("*.bundle"))) > 2, "so few bundles are merged without a tree"
    assert totals.count == IMAGES
    assert kept.notes.units == list(range(5))


@pytest.mark.usefixtures("joined")
def test_too_many_lost_and_no_progress_are_clear_failures(data: Path, tmp_path: Path) -> None:
    manifest = open_dataset("many", str(data), None, None)
    with pytest.raises(UserError, match=r"512 of 2148 images cannot be read, the first .*unit 0 was given up"):
        counting_pass(manifest, tmp_path / "a", FaultyTask(dies_at=0), max_bad_fraction=0.01).run()
    with pytest.raises(UserError, match=r"nothing was done for .*--no_progress_minutes"):
        counting_pass(manifest, tmp_path / "b", FaultyTask(hangs_at=2), no_progress_minutes=0.15).run()
    with pytest.raises(UserError, match="nothing was done for"):  # not even the first unit
        counting_pass(manifest, tmp_path / "c", FaultyTask(hangs_at=0), no_progress_minutes=0.15).run()
    assert not [thread for thread in threading.enumerate() if "_pull" in thread.name], "a pass leaves no thread behind"
