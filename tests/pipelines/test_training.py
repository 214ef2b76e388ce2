"""jobs/train.py: what it writes, that the seed decides, that where tokens come from does not, and each thing gone wrong."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from patchsae_ray.errors import UserError
from patchsae_ray.parsing import parse
from patchsae_ray.pipelines.model import load_model
from patchsae_ray.pipelines.planning import Plan
from patchsae_ray.pipelines.token_sources import Fused
from patchsae_ray.pipelines.train import extra_steps, images_of, order_of, train
from patchsae_ray.pipelines.train_plan import _gpu_plan as gpu_plan
from patchsae_ray.sae.checkpoint import SaeCheckpoint, read_checkpoint
from patchsae_ray.settings import TrainSettings
from tests.conftest import GOLDEN, JobRunner
from tests.data.makers import make_torn_folder
from tests.sae.test_checkpoint import RELEASED_LOOKS_UP

MODEL = ["--backbone", str(GOLDEN / "clip.json"), "--clip_weights", str(GOLDEN / "clip.safetensors")]
DATA = ["--dataset_name", "golden", "--dataset_path", str(GOLDEN / "images")]
SHORT = [*MODEL, *DATA, "--expansion_factor", "2", "--batch_size", "16", "--total_training_images", "200"]
SHORT += ["--clip_batch_size", "8", "--num_workers", "0"]

REGRESSION = ["--run_name", "regression", "--total_training_images", "800", "--lr", "0.003", "--lr_warm_up_steps", "5"]
REGRESSION += ["--l1_coefficient", "0.003", "--dead_feature_window", "2"]

Train = Callable[..., dict[str, float]]


@pytest.fixture
def train_here(ready_mlflow: Path, tmp_path: Path) -> Train:
    return trainer_under(tmp_path, ready_mlflow)


def trainer_under(root: Path, ready_mlflow: Path) -> Train:
    """Train in this process, under a root."""
    shutil.copy(ready_mlflow, root / "mlflow.db")

    def run(*flags: str) -> dict[str, float]:
        return train(parse(TrainSettings, ["--root_dir", str(root), *flags]))

    return run


@pytest.fixture(scope="module")
def plain(ready_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> SaeCheckpoint:
    """What SHORT alone comes to."""
    root = tmp_path_factory.mktemp("plain")
    trainer_under(root, ready_mlflow)(*SHORT, "--run_name", "plain")
    return checkpoint(root, "plain")


def checkpoint(root: Path, name: str) -> SaeCheckpoint:
    return read_checkpoint(str(root / "out" / "checkpoints" / name / "sae.pt"))


def test_train_writes_checkpoints_that_read_back(train_here: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = [*SHORT, "--run_name", "tiny", "--n_checkpoints", "2", "--block_layer", "-3", "--lr_warm_up_steps", "5"]
    metrics = train_here(*flags)
    folder = tmp_path / "out" / "checkpoints" / "tiny"
    written = {path.name for path in folder.iterdir()}
    assert written == {
        "sae.pt", "sae.safetensors", "run.json", "errors.parquet", "batch_mixing.png", "latent_density.png", "sae_64_images.pt",
        "sae_144_images.pt",
    }  # fmt: skip
    found = checkpoint(tmp_path, "tiny")
    assert found.digest == read_checkpoint(str(folder / "sae.safetensors")).digest
    assert (found.sae.d_in, found.sae.d_sae) == (128, 256)
    assert found.block_layer == -3
    assert set(torch.load(folder / "sae.pt", weights_only=True)["cfg"]) >= RELEASED_LOOKS_UP
    assert (metrics["images"], metrics["steps"]) == (200, 13)
    run = json.loads((folder / "run.json").read_text())["runs"]["train"]
    assert len(run["devices"]) == 1
    assert run["summary"]["distinct_classes"] == run["summary"]["distinct_classes_random"] == 6
    early = read_checkpoint(str(folder / "sae_64_images.pt"))
    assert early.digest != found.digest
    caplog.set_level("INFO")
    assert train_here(*flags) == json.loads((folder / "run.json").read_text())["runs"]["train"]["summary"]
    assert "already finished" in caplog.text
    with pytest.raises(UserError, match=r"lr 0.0004 there, 0.1 here"):
        train_here(*flags, "--lr", "0.1")
    assert checkpoint(tmp_path, "tiny").digest == found.digest
    caplog.clear()
    train_here(*flags, "--overwrite")
    assert "already finished" not in caplog.text
    assert checkpoint(tmp_path, "tiny").digest == found.digest


def test_the_seed_decides_the_weights(train_here: Train, tmp_path: Path, plain: SaeCheckpoint) -> None:
    for name, seed in {"same": "42", "other": "2"}.items():
        train_here(*SHORT, "--run_name", name, "--seed", seed)
    assert checkpoint(tmp_path, "same").digest == plain.digest != checkpoint(tmp_path, "other").digest


@pytest.mark.parametrize(
    "flags",
    [
        ["--batching", "images"],
        ["--token_share", "0.5"],
        ["--activation_dtype", "fp32"],
        ["--batch_tokens", "100"],
        ["--buffer_tokens", "500"],
        ["--clip_batch_size", "4"],
        ["--b_dec_init_method", "mean"],
        ["--vit_type", "maple", "--model_path", str(GOLDEN / "model.pth.tar-5"), "--config_path", str(GOLDEN / "maple.yaml")],
    ],
)
def test_each_setting_changes_what_is_learned(
    train_here: Train, tmp_path: Path, plain: SaeCheckpoint, flags: list[str]
) -> None:
    train_here(*SHORT, "--run_name", "other", *flags)
    assert checkpoint(tmp_path, "other").digest != plain.digest


def test_accumulation_changes_memory_and_nothing_else(train_here: Train, tmp_path: Path, plain: SaeCheckpoint) -> None:
    train_here(*SHORT, "--run_name", "parts", "--accumulate", "3")
    parts = checkpoint(tmp_path, "parts").sae.state_dict()
    for name, value in plain.sae.state_dict().items():
        assert torch.allclose(value, parts[name], atol=1e-5), name


def test_checkpoints_go_by_the_clock_too(train_here: Train, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train_here(*SHORT, "--run_name", "clock", "--checkpoint_steps", "0", "--checkpoint_minutes", "1e-6")
    assert "train: checkpoint of step 1 written" in caplog.text
    caplog.clear()
    train_here(*SHORT, "--run_name", "steps", "--checkpoint_steps", "5", "--checkpoint_minutes", "0")
    assert "checkpoint of step 5 written" in caplog.text
    assert "checkpoint of step 1 written" not in caplog.text


def test_a_tiny_runs_metrics_are_what_they_were(train_here: Train) -> None:
    """The committed values; a change of them is a change of the training, and is made on purpose."""
    expected = json.loads((Path(__file__).parent / "expected_training.json").read_text())
    metrics = train_here(*SHORT, *REGRESSION)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_explodes_is_one_line(train_here: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training stopped: the loss is .*; a lower --lr or another"):
        train_here(*SHORT, "--lr", "1e30", "--lr_scheduler_name", "constant", "--run_name", "wild")
    assert not list((tmp_path / "out").rglob("sae.*"))


class Stubborn(Iterator[Any]):
    """An iterator that cannot be closed, as a generator that a thread is still in."""

    def __init__(self, inside: Iterator[Any]) -> None:
        self._inside = inside

    def __next__(self) -> Any:
        return next(self._inside)

    def close(self) -> None:
        raise ValueError("generator already executing")


def test_what_closing_comes_to_does_not_hide_the_cause(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Fused.chunks
    monkeypatch.setattr(Fused, "chunks", lambda self, wanted: Stubborn(chunks(self, wanted)))
    with pytest.raises(UserError, match=r"^training stopped: the loss is"):
        train_here(*SHORT, "--lr", "1e30", "--lr_scheduler_name", "constant", "--run_name", "wild")


def test_a_cluster_of_gpus_trains_in_no_process_that_it_does_not_know() -> None:
    plan = Plan("cuda", 1, 1, 1.0, 1.0, 1.0, 1, "bf16")
    with pytest.raises(UserError, match=r"--num_workers 0 trains in the job's own process, where Ray reserves no GPU for it"):
        gpu_plan(TrainSettings(num_workers=0, source="streamed"), plan, 4.0, "streamed")


def test_running_out_of_memory_is_one_line(train_here: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training worker 0 of 1 ran out of memory on cpu; a smaller --batch_size"):
        train_here(*SHORT, "--expansion_factor", "100000000", "--run_name", "huge")
    assert not list((tmp_path / "out").rglob("sae.*"))


def test_nan_activations_are_named(train_here: Train, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(GOLDEN / "clip.safetensors")
    weights["visual.ln_pre.bias"][3] = float("inf")
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"image \d+ of the data set: NaN or infinite activations at the hook"):
        train_here(*SHORT, "--clip_weights", str(tmp_path / "broken.safetensors"), "--run_name", "nan")


def test_too_many_bad_images_stop_the_run_and_few_are_listed(train_here: Train, tmp_path: Path) -> None:
    images = tmp_path / "images"
    make_torn_folder(images, 40, torn=7)
    flags = [*SHORT, "--dataset_name", "torn", "--dataset_path", str(images), "--run_name", "torn"]
    with pytest.raises(UserError, match=r"1 of 40 images cannot be read, the first 007.png \("):
        train_here(*flags)
    assert train_here(*flags, "--max_bad_fraction", "0.05")["bad_images"] == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--source", "cached"], "--source cached needs --activations"),
        (["--source", "fused", "--activations", "x"], "--activations is for --source cached"),
        (["--workers", "2"], "--workers is for --source streamed; tokens are fused here"),
        (["--batching", "images", "--batch_tokens", "9"], "--batch_tokens: with --batching images"),
        (["--token_share", "0"], "--token_share 0: above 0"),
        (["--checkpoint_steps", "0", "--checkpoint_minutes", "0"], "one of them above 0"),
        (["--precision", "fp16"], "--precision fp16: training takes fp32 or bf16"),
        (["--activations", "/nowhere"], "--activations /nowhere: no cache.json there"),
    ],
)
def test_flags_that_do_not_go_together(train_here: Train, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train_here(*SHORT, *flags)


def test_extra_steps() -> None:
    assert extra_steps(0, 100) == ()
    assert extra_steps(3, 100) == (25, 50, 75)
    assert extra_steps(50, 4) == (1, 2, 3)


def test_tokens_are_counted_as_tokens() -> None:
    from patchsae_ray.data.catalog import open_dataset

    manifest = open_dataset("demo", None, None, None)

    def images(**how: object) -> float:
        settings = TrainSettings(**how)  # type: ignore[arg-type]
        order = order_of(settings, load_model(settings), manifest)
        return images_of(order, order.steps)

    assert images(total_training_tokens=1300) == 20
    assert images(total_training_tokens=1300, batching="images") == 20
    assert images(total_training_tokens=1280, tokens="patch") == 20
    assert images(total_training_tokens=1000, tokens="cls") == 1000
    assert images() == 2_621_440
    assert images(token_share=0.5) == 2_621_440


@pytest.mark.ray
def test_streams_through_ray_train_learn_the_same(run_command: JobRunner, tmp_path: Path, plain: SaeCheckpoint) -> None:
    done = run_command("train", tmp_path, *SHORT, "--run_name", "streamed", "--num_workers", "1", "--source", "streamed")
    assert done.code == 0, done.err
    assert "tokens streamed, 1 CLIP actor" in done.out
    assert checkpoint(tmp_path, "streamed").digest == plain.digest


@pytest.mark.ray
def test_more_workers_than_lanes_are_refused(run_command: JobRunner, tmp_path: Path) -> None:
    done = run_command("train", tmp_path, *SHORT, "--num_workers", "40")
    assert done.code == 2
    assert "error: --num_workers 40: the tokens of this run come in" in done.err
