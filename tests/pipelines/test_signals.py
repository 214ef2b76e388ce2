"""SIGTERM in each job: 143, the MLflow run is KILLED, what was committed stays, the same command goes on in the same run."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from patchsae_ray import storage
from patchsae_ray.data.manifest import UNIT_SIZE
from patchsae_ray.tracking_server import EXPERIMENT
from tests.conftest import RayHead, golden_model_flags
from tests.data.makers import parquet_bytes
from tests.pipelines.commands import pids, start, wait_for
from tests.pipelines.test_training import MODEL

pytestmark = pytest.mark.ray

IMAGES = 4 * UNIT_SIZE
COMMITS = ["--commit_seconds", "0"]
TRAIN = [*MODEL, "--expansion_factor", "8", "--batch_size", "14", "--total_training_images", "4200", "--checkpoint_steps", "10"]
TRAIN += ["--clip_batch_size", "16", "--run_name", "run"]
JOBS = {
    "extract": [*golden_model_flags(), *COMMITS],
    "class_latents": [*golden_model_flags(), *COMMITS],
    "steer": [*golden_model_flags(), *COMMITS, "--rank_by", "image", "--topk", "5"],
    "evaluate": [*golden_model_flags(), *COMMITS, "--eval_images", "0"],
    "cache_activations": [*MODEL, *COMMITS],
    "train": [*TRAIN, "--num_workers", "0"],
    "train on Ray": [*TRAIN, "--num_workers", "1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    labels = [number * 3 // IMAGES for number in range(IMAGES)]
    (folder / "rows.parquet").write_bytes(parquet_bytes(list(range(IMAGES)), labels, row_group_size=UNIT_SIZE))
    (folder / "names.json").write_text(json.dumps(["one", "two", "three"]))
    return ["--dataset_name", "many", "--dataset_path", str(folder / "rows.parquet")]


def committed(root: Path) -> set[str]:
    """Bundles of results, and checkpoints to resume from."""
    found = {entry.path for entry in storage.entries(str(root))}
    return {path for path in found if path.endswith(".bundle") or "/step-" in path}


def runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    return [run for run in found if run.info.run_name != "made-ready"]


@pytest.mark.parametrize("job", JOBS)
def test_sigterm_ends_a_job_in_order(ray_head: RayHead, ready_mlflow: Path, data: list[str], tmp_path: Path, job: str) -> None:
    root, name = tmp_path / "root", job.split()[0]
    flags = [*data, *JOBS[job]]
    if name in ("steer", "evaluate"):
        flags += ["--classnames", str(Path(data[-1]).parent / "names.json")]
    running = start(ray_head, ready_mlflow, tmp_path, str(root), *flags, job=name)
    wait_for(lambda: committed(root))
    running.send_signal(signal.SIGTERM)
    code = running.wait(20)
    said = (tmp_path / "err").read_text()
    assert code == 143, said
    assert said.endswith("terminated\n")
    assert "Traceback" not in said
    (ended,) = runs(tmp_path)
    assert ended.info.status == "KILLED"
    assert committed(root)
    wait_for(lambda: not pids("ray::RayTrainWorker") and not pids("ray::MapWorker"))

    assert start(ray_head, ready_mlflow, tmp_path, str(root), *flags, job=name).wait(200) == 0, (tmp_path / "err").read_text()
    out = (tmp_path / "out").read_text()
    assert "were done by earlier runs" in out or "goes on from the checkpoint of step" in out
    (run,) = runs(tmp_path)
    assert run.info.run_id == ended.info.run_id
    assert run.info.status == "FINISHED"
    assert not list(root.rglob("mlflow/*.json*"))
