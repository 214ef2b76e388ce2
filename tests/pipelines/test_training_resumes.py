"""Training that is killed goes on where its newest checkpoint stands, to the same weights; on S3 too."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from patchsae_ray import storage
from patchsae_ray.data.manifest import UNIT_SIZE
from patchsae_ray.sae.checkpoint import read_checkpoint
from tests.conftest import JobRunner, RayHead, S3Server
from tests.data.makers import parquet_bytes
from tests.pipelines.commands import pids, start, wait_for
from tests.pipelines.test_training import MODEL

pytestmark = pytest.mark.ray

IMAGES = UNIT_SIZE + 300
STEPS = 150


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 150 steps, two and a half epochs, with a checkpoint every ten."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    path.write_bytes(parquet_bytes(list(range(IMAGES)), None, row_group_size=100))
    images = str(14 * STEPS)
    return [
        *MODEL, "--dataset_name", "many", "--dataset_path", str(path), "--expansion_factor", "8", "--run_name", "run",
        "--batch_size", "14", "--total_training_images", images, "--clip_batch_size", "16", "--checkpoint_steps", "10",
        "--lr_warm_up_steps", "20", "--dead_feature_window", "5",
    ]  # fmt: skip


def weights(root: str) -> dict[str, torch.Tensor]:
    found = read_checkpoint(storage.join(root, "out/checkpoints/run/sae.safetensors"))
    return dict(found.sae.state_dict())


def checkpoints(root: str) -> list[str]:
    """URIs of the checkpoints to resume from, oldest first."""
    folder = storage.join(root, "out/checkpoints/run/resume")
    return [storage.join(folder, entry.path) for entry in storage.entries(folder) if "/step-" in entry.path]


def newest_step(root: str) -> int:
    return max((int(uri[-24:].split("-")[-1].split(".")[0]) for uri in checkpoints(root)), default=0)


def furthest_apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def undisturbed(run_command: JobRunner, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("undisturbed")
    done = run_command("train", root, *flags, "--num_workers", "2")
    assert done.code == 0, done.err
    assert not checkpoints(str(root)), "a finished run needs no checkpoints to resume from"
    return weights(str(root))


@pytest.fixture(scope="module")
def alone(run_command: JobRunner, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("alone")
    done = run_command("train", root, *flags, "--num_workers", "0")
    assert done.code == 0, done.err
    return weights(str(root))


def test_two_workers_learn_what_one_process_does(undisturbed: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    assert 0 < furthest_apart(undisturbed, alone) < 1e-3  # sums in another order, over 150 steps of Adam


def test_a_killed_worker_then_a_killed_driver_then_a_cut_checkpoint(
    ray_head: RayHead, ready_mlflow: Path, run_command: JobRunner, flags: list[str], undisturbed: dict[str, torch.Tensor],
    alone: dict[str, torch.Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    root = str(tmp_path / "killed")
    job = start(ray_head, ready_mlflow, tmp_path / "first", root, *flags, "--num_workers", "2", job="train")
    wait_for(lambda: newest_step(root) >= 20)
    os.kill(pids("ray::RayTrainWorker")[0], signal.SIGKILL)
    out = tmp_path / "first" / "out"
    wait_for(lambda: "goes on from the checkpoint of step" in out.read_text())
    stood = newest_step(root)
    wait_for(lambda: newest_step(root) >= stood + 20)
    job.kill()
    job.wait(10)
    assert "starting again from the newest checkpoint" in out.read_text()
    assert job.returncode == -signal.SIGKILL, "the job had ended before it was killed"
    wait_for(lambda: not pids("ray::RayTrainWorker"))
    newest = Path(checkpoints(root)[-1])
    newest.write_bytes(newest.read_bytes()[:-1000])
    shutil.copytree(root, tmp_path / "copy")

    resumed = run_command("train", Path(root), *flags, "--num_workers", "2")
    assert resumed.code == 0, resumed.err
    assert f"{newest} is not whole: passed over" in resumed.err + resumed.out
    assert "train: goes on from the checkpoint of step" in resumed.out
    assert furthest_apart(weights(root), undisturbed) < 1e-6

    other = run_command("train", tmp_path / "copy", *flags, "--num_workers", "0")
    assert other.code == 0, other.err
    assert "train: goes on from the checkpoint of step" in other.out
    assert furthest_apart(weights(str(tmp_path / "copy")), undisturbed) < 1e-3
    assert furthest_apart(weights(str(tmp_path / "copy")), alone) < 1e-3


def test_on_s3_a_killed_run_goes_on_and_another_runs_checkpoint_is_refused(
    ray_head: RayHead, ready_mlflow: Path, s3_server: S3Server, flags: list[str], alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert s3_server
    root = "s3://bucket/training"
    here = [*flags, "--num_workers", "0"]
    job = start(ray_head, ready_mlflow, tmp_path / "first", root, *here, job="train")
    wait_for(lambda: newest_step(root) >= 30)
    job.kill()
    assert job.wait(10) == -signal.SIGKILL

    refused = start(ray_head, ready_mlflow, tmp_path / "other", root, *here, "--lr", "0.1", job="train")
    assert refused.wait(100) == 2
    assert "is a checkpoint of another run (lr 0.0004 there, 0.1 here)" in (tmp_path / "other" / "err").read_text()

    again = start(ray_head, ready_mlflow, tmp_path / "again", root, *here, job="train")
    assert again.wait(200) == 0, (tmp_path / "again" / "err").read_text()
    assert "train: goes on from the checkpoint of step" in (tmp_path / "again" / "out").read_text()
    assert furthest_apart(weights(root), alone) < 1e-6
    assert not checkpoints(root)
