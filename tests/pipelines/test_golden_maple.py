"""The commands with the golden MaPLe adapter, against what the released PatchSAE wrote in fp16, and the comparison with base.

How close they come is as the golden README says: the released code runs MaPLe in fp16.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN, JobRunner, golden_flags

pytestmark = pytest.mark.ray

EXPECTED = GOLDEN / "expected"
OFFSET = "0.105131256516992"
MAPLE = ["--vit_type", "maple", "--model_path", str(GOLDEN / "model.pth.tar-5"), "--config_path", str(GOLDEN / "maple.yaml")]


@pytest.fixture(scope="module")
def root(run_command: JobRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maple")
    features = root / "out" / "feature_data"
    counts = {vit: str(features / vit / "golden" / "cls_sae_cnt.npy") for vit in ("base", "maple")}
    for flags in ([], MAPLE):
        done = run_command("extract", root, *golden_flags(), *flags)
        assert done.code == 0, done.err
    for own, other, flags in (("base", "maple", []), ("maple", "base", MAPLE)):
        steering = ["--cls_wise_sae_activation_path", counts[own], "--cross_counts", counts[other], "--rank_by", "class,cross"]
        done = run_command("steer", root, *golden_flags(), *flags, *steering, "--output_offset", OFFSET)
        assert done.code == 0, done.err
    return root


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(EXPECTED / "features_maple.safetensors")


def load(root: Path, name: str) -> torch.Tensor:
    return torch.load(root / "out" / "feature_data" / "maple" / "golden" / f"{name}.pt", weights_only=True)


def test_means_and_frequencies(root: Path, expected: dict[str, torch.Tensor]) -> None:
    frequency, theirs = load(root, "sae_sparsity"), expected["sae_sparsity"]
    apart = (frequency - theirs).abs() * 69
    assert (apart > 0.5).float().mean() < 0.05
    assert apart.max() < 2.5, "an image or two"
    product = torch.nan_to_num(expected["sae_mean_acts"]) * theirs
    assert torch.allclose(load(root, "sae_mean_acts") * frequency, product, rtol=2e-2, atol=2e-3)


def test_class_counts(root: Path, expected: dict[str, torch.Tensor]) -> None:
    counts = np.load(root / "out" / "feature_data" / "maple" / "golden" / "cls_sae_cnt.npy")
    theirs = expected["cls_sae_cnt_classes_by_latents"].numpy().T
    assert abs(counts.sum() / theirs.sum() - 1) < 0.01
    assert np.abs(counts - theirs).sum() / theirs.sum() < 0.01


def test_top_images(root: Path, expected: dict[str, torch.Tensor]) -> None:
    positions, theirs = load(root, "max_activating_image_indices"), expected["max_activating_image_indices"]
    filled = positions >= 0
    assert (positions == theirs)[filled].float().mean() > 0.95
    values = load(root, "max_activating_image_values")
    assert torch.allclose(values[filled], expected["max_activating_image_values"][filled], rtol=2e-2, atol=5e-3)


def test_prompt_tokens_are_counted_apart_too(root: Path) -> None:
    mean = {
        kind: load(root, f"sae_mean_acts_{kind}") * load(root, f"sae_sparsity_{kind}") for kind in ("cls", "patch", "prompt")
    }
    whole = load(root, "sae_mean_acts") * load(root, "sae_sparsity")
    assert torch.allclose((mean["cls"] + 16 * mean["patch"] + 2 * mean["prompt"]) / 19, whole, rtol=1e-4, atol=1e-6)


def test_steering_metrics(root: Path) -> None:
    metrics = pd.read_csv(root / "eval_outputs" / "maple" / "golden" / "metrics.csv", index_col="masking")
    golden = pd.read_csv(EXPECTED / "metrics_maple.csv", index_col="masking")
    assert list(metrics.index) == list(golden.index)
    assert list(metrics.columns) == list(golden.columns)
    images = np.array([9, 10, 11, 12, 13, 14])
    apart = np.abs(metrics.to_numpy() - golden.to_numpy()) / 100 * images
    assert (apart > 0.5).sum() <= 3
    assert apart.max() < 1.5, "one image"


def test_base_is_untouched_by_the_adapter(root: Path) -> None:
    metrics = pd.read_csv(root / "eval_outputs" / "base" / "golden" / "metrics.csv", index_col="masking")
    golden = pd.read_csv(EXPECTED / "metrics_base.csv", index_col="masking")
    assert np.allclose(metrics.to_numpy(), golden.to_numpy(), rtol=0, atol=1e-9)


def test_halves_are_classified_among_themselves(root: Path) -> None:
    steered = root / "eval_outputs" / "base" / "golden"
    halves = pd.read_csv(steered / "metrics_halves.csv", index_col=["ranking", "masking"])
    metrics = pd.read_csv(steered / "metrics.csv", index_col="masking")
    among_own = halves.loc["class"]
    assert (among_own.to_numpy() >= metrics.to_numpy()).all(), "fewer classes to be taken for"
    assert (among_own.to_numpy() > metrics.to_numpy()).any()
    summary = json.loads((steered / "summary.json").read_text())["no_sae"]
    assert summary["base"]["percent"] == pytest.approx(among_own.loc["no_sae"].iloc[:3].mean(), abs=1e-5)
    assert summary["novel"]["percent"] == pytest.approx(among_own.loc["no_sae"].iloc[3:].mean(), abs=1e-5)


@pytest.mark.parametrize("classes", ["all", "novel"])
def test_compare(run_command: JobRunner, root: Path, classes: str) -> None:
    done = run_command("compare", root, "--dataset_name", "golden", "--classes", classes)
    assert done.code == 0, done.err
    assert "Ray:" not in done.out
    folder = root / "out" / "compare" / "maple" / "golden" / classes
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finding"] in done.out
    table = pd.read_csv(folder / "classes.csv")
    assert table["name"].tolist() == json.loads((GOLDEN / "classnames.json").read_text())[0 if classes == "all" else 3 :]
    counts = {vit: np.load(root / "out" / "feature_data" / vit / "golden" / "cls_sae_cnt.npy") for vit in ("base", "maple")}
    latents = pd.read_parquet(folder / "latents.parquet")
    for row in latents.itertuples():
        assert row.count_base == counts["base"][row.latent, row[1]]
        assert row.count_adapted == counts["maple"][row.latent, row[1]]
    groups = latents.groupby(["class", "group"]).size().unstack(fill_value=0)
    assert groups["high in both"].tolist() == table["high_in_both"].tolist()
    tables = {
        vit: pd.read_csv(root / "eval_outputs" / vit / "golden" / "metrics.csv", index_col=0) for vit in ("base", "maple")
    }
    if classes == "all":
        assert np.allclose(table["accuracy_adapted"], tables["maple"].loc["no_sae"])
    conditions = pd.read_csv(folder / "conditions.csv")
    assert set(zip(conditions["classifier"], conditions["counts"], strict=True)) == {
        (classifier, counted) for classifier in ("base", "adapted") for counted in ("base", "adapted")
    }
    page = (folder / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    again = run_command("compare", root, "--dataset_name", "golden", "--classes", classes)
    assert "already finished" in again.out


def test_what_does_not_compare(run_command: JobRunner, root: Path, tmp_path: Path) -> None:
    missing = run_command("compare", tmp_path, "--dataset_name", "golden")
    assert missing.code == 2
    assert "no finished run made it; jobs/extract.py --vit_type base would" in missing.err
    mixed = tmp_path / "mixed"
    for vit in ("base", "maple"):
        for kind in ("out/feature_data", "eval_outputs"):
            target = mixed / kind / vit
            target.mkdir(parents=True)
            (target / "golden").symlink_to(root / kind / vit / "golden")
    run_file = mixed / "eval_outputs" / "maple" / "golden" / "run.json"
    state = json.loads(run_file.read_text())
    state["runs"]["steer"]["identity"]["error_term"] = "add"
    (mixed / "eval_outputs" / "maple" / "golden").unlink()
    (mixed / "eval_outputs" / "maple" / "golden").mkdir()
    for path in (root / "eval_outputs" / "maple" / "golden").iterdir():
        (mixed / "eval_outputs" / "maple" / "golden" / path.name).symlink_to(path)
    run_file.unlink()
    run_file.write_text(json.dumps(state))
    refused = run_command("compare", mixed, "--dataset_name", "golden")
    assert refused.code == 2
    assert "the steering of base and of maple do not compare: error_term is none there and add here" in refused.err


def test_training_on_adapted_clip(run_command: JobRunner, tmp_path: Path) -> None:
    data = ["--dataset_name", "golden", "--dataset_path", str(GOLDEN / "images")]
    model = ["--backbone", str(GOLDEN / "clip.json"), "--clip_weights", str(GOLDEN / "clip.safetensors"), *MAPLE]
    length = ["--total_training_tokens", str(2 * 32 * 19), "--batch_size", "32", "--expansion_factor", "2"]
    done = run_command("train", tmp_path, *data, *model, *length, "--run_name", "adapted")
    assert done.code == 0, done.err
    assert "adapted with MaPLe" in done.out
    assert "train: 64 images in 2 steps of 608 tokens" in done.out, "prompt tokens are tokens"
    state = torch.load(tmp_path / "out" / "checkpoints" / "adapted" / "sae.pt", weights_only=True)["state_dict"]
    assert state["W_enc"].shape == (128, 256)
    record = json.loads((tmp_path / "out" / "checkpoints" / "adapted" / "run.json").read_text())["runs"]["train"]
    assert record["identity"]["vit_type"] == "maple"
