"""jobs/train.py as a command: what it writes, that it is the seed's alone, and that each flag does what it says."""

import json
from pathlib import Path

import pytest
import torch

from patchsae_ray.pipelines.train import images_to_train_on
from patchsae_ray.pipelines.train_worker import checkpoint_steps
from patchsae_ray.sae.checkpoint import read_checkpoint
from tests.conftest import GOLDEN, JobRunner
from tests.sae.test_checkpoint import RELEASED_LOOKS_UP

pytestmark = pytest.mark.ray

MODEL = ["--backbone", str(GOLDEN / "clip.json"), "--clip_weights", str(GOLDEN / "clip.safetensors")]
DATA = ["--dataset_name", "golden", "--dataset_path", str(GOLDEN / "images")]
SHORT = [*MODEL, *DATA, "--expansion_factor", "2", "--batch_size", "16", "--total_training_images", "200"]


def test_train_writes_checkpoints_that_read_back(run_command: JobRunner, tmp_path: Path) -> None:
    flags = [*SHORT, "--run_name", "tiny", "--n_checkpoints", "2", "--block_layer", "-3", "--lr_warm_up_steps", "5"]
    done = run_command("train", tmp_path, *flags)
    assert done.code == 0, done.err
    folder = tmp_path / "out" / "checkpoints" / "tiny"
    written = {path.name for path in folder.iterdir()}
    assert written == {
        "sae.pt", "sae.safetensors", "run.json", "errors.parquet", "sae_64_images.pt", "sae_144_images.pt",
    }  # fmt: skip
    checkpoint = read_checkpoint(str(folder / "sae.pt"))
    assert checkpoint.digest == read_checkpoint(str(folder / "sae.safetensors")).digest
    assert (checkpoint.sae.d_in, checkpoint.sae.d_sae) == (128, 256)
    assert checkpoint.block_layer == -3
    assert set(torch.load(folder / "sae.pt", weights_only=True)["cfg"]) >= RELEASED_LOOKS_UP
    metrics = json.loads((folder / "run.json").read_text())["runs"]["train"]["summary"]
    assert (metrics["images"], metrics["steps"]) == (200, 13)
    early = read_checkpoint(str(folder / "sae_64_images.pt"))
    assert early.digest != checkpoint.digest
    again = run_command("train", tmp_path, *flags)
    assert again.code == 0
    assert "done already" in again.out
    other = run_command("train", tmp_path, *flags, "--lr", "0.1")
    assert other.code == 2
    assert "lr 0.0004 there, 0.1 here" in other.err
    assert read_checkpoint(str(folder / "sae.pt")).digest == checkpoint.digest


def test_the_seed_decides_the_weights(run_command: JobRunner, tmp_path: Path) -> None:
    digests = {}
    for name, seed in {"first": "1", "again": "1", "other": "2"}.items():
        done = run_command("train", tmp_path, *SHORT, "--run_name", name, "--seed", seed, "--tokens", "patch")
        assert done.code == 0, done.err
        digests[name] = read_checkpoint(str(tmp_path / "out" / "checkpoints" / name / "sae.pt")).digest
    assert digests["first"] == digests["again"] != digests["other"]


def test_a_loss_that_explodes_is_one_line(run_command: JobRunner, tmp_path: Path) -> None:
    done = run_command("train", tmp_path, *SHORT, "--lr", "1e30", "--lr_scheduler_name", "constant")
    assert done.code == 2
    assert "error: training stopped: the loss is" in done.err
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_checkpoint_steps() -> None:
    assert checkpoint_steps(0, 100) == []
    assert checkpoint_steps(3, 100) == [25, 50, 75]
    assert checkpoint_steps(50, 4) == [1, 2, 3]


def test_tokens_are_counted_as_tokens() -> None:
    from patchsae_ray.pipelines.model import load_model
    from patchsae_ray.settings import TrainSettings

    settings = {kind: TrainSettings(total_training_tokens=1000, tokens=kind) for kind in ("all", "patch", "cls")}  # type: ignore[arg-type]
    model = load_model(settings["all"])
    assert {kind: images_to_train_on(one, model) for kind, one in settings.items()} == {"all": 16, "patch": 16, "cls": 1000}
    assert images_to_train_on(TrainSettings(), model) == 2_621_440
