"""The commands on the golden case, against what the released PatchSAE wrote for it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from patchsae_ray.pipelines.devices import device_name
from tests.conftest import GOLDEN, JobRunner, golden_flags

pytestmark = pytest.mark.ray

EXPECTED = GOLDEN / "expected"
OFFSET = "0.105131256516992"
RANKINGS = "class,dataset,random:2,image,predicted"


@pytest.fixture(scope="module")
def extracted(run_command: JobRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    done = run_command("extract", root, *golden_flags())
    assert done.code == 0, done.err
    return root


@pytest.fixture(scope="module")
def features(extracted: Path) -> Path:
    return extracted / "out" / "feature_data" / "base" / "golden"


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(EXPECTED / "features_base.safetensors")


def load(folder: Path, name: str) -> torch.Tensor:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_top_images_equal_where_a_slot_is_filled(features: Path, expected: dict[str, torch.Tensor]) -> None:
    positions = load(features, "max_activating_image_indices")
    filled = positions >= 0
    assert positions.dtype == torch.int64
    for name in ("max_activating_image_indices", "max_activating_image_label_indices"):
        assert torch.equal(load(features, name)[filled], expected[name][filled])
    values = load(features, "max_activating_image_values")
    assert torch.allclose(values[filled], expected["max_activating_image_values"][filled], rtol=0, atol=8e-5)
    assert (values[~filled] == 0).all()
    assert (expected["max_activating_image_values"][~filled] == 0).all()


def test_means_and_frequencies(features: Path, expected: dict[str, torch.Tensor]) -> None:
    never = torch.isnan(expected["sae_mean_acts"])
    assert never.sum() == 65
    means = load(features, "sae_mean_acts")
    assert torch.allclose(means[~never], expected["sae_mean_acts"][~never], rtol=2e-5, atol=2e-6)
    assert (means[never] == 0).all()
    assert torch.equal(load(features, "sae_sparsity"), expected["sae_sparsity"])


def test_class_counts_exact(features: Path, expected: dict[str, torch.Tensor]) -> None:
    counts = np.load(features / "cls_sae_cnt.npy")
    assert counts.dtype == np.int64
    assert np.array_equal(counts, expected["cls_sae_cnt_classes_by_latents"].numpy().T)


def test_run_file_says_what_was_run(features: Path) -> None:
    state = json.loads((features / "run.json").read_text())
    record = state["runs"]["extract"]
    assert record["identity"]["threshold"] == "0.2"
    assert record["num_images"] == 69
    assert record["devices"] == [device_name("cpu")]
    assert {"read", "decode", "copy", "to_hook", "encode", "reduce", "combine", "commit", "merge"} <= set(record["seconds"])
    assert record["summary"]["dead_latents"] == 65
    assert set(state["files"]) == {path.name for path in features.iterdir()} - {"run.json"}
    assert pq.read_table(features / "errors.parquet").num_rows == 0


def test_class_latents_is_instant_after_extract(run_command: JobRunner, extracted: Path, features: Path) -> None:
    before = (features / "run.json").read_bytes()
    done = run_command("class_latents", extracted, *golden_flags(), "--threshold", "0.2")
    assert done.code == 0
    assert "already finished" in done.out
    assert (features / "run.json").read_bytes() == before


def test_class_latents_alone_equals_golden(run_command: JobRunner, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    done = run_command("class_latents", tmp_path, *golden_flags(), "--threshold", "0.2", "--batch_size", "7")
    assert done.code == 0, done.err
    counts = np.load(tmp_path / "out" / "feature_data" / "base" / "golden" / "cls_sae_cnt.npy")
    assert np.array_equal(counts, expected["cls_sae_cnt_classes_by_latents"].numpy().T)


@pytest.fixture(scope="module")
def steered(run_command: JobRunner, extracted: Path, features: Path) -> Path:
    counts = ["--cls_wise_sae_activation_path", str(features / "cls_sae_cnt.npy")]
    done = run_command(
        "steer", extracted, *golden_flags(), *counts, "--output_offset", OFFSET, "--rank_by", RANKINGS, "--predictions"
    )
    assert done.code == 0, done.err
    return extracted / "eval_outputs" / "base" / "golden"


def test_steering_metrics_exact(steered: Path) -> None:
    metrics = pd.read_csv(steered / "metrics.csv", index_col="masking")
    golden = pd.read_csv(EXPECTED / "metrics_base.csv", index_col="masking")
    assert list(metrics.index) == list(golden.index)
    assert list(metrics.columns) == list(golden.columns)
    assert np.allclose(metrics.to_numpy(), golden.to_numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranking", ["dataset", "random", "image", "predicted"])
def test_other_rankings_have_tables_of_their_own(steered: Path, ranking: str) -> None:
    metrics = pd.read_csv(steered / "metrics.csv", index_col="masking")
    other = pd.read_csv(steered / f"metrics_{ranking}.csv", index_col="masking")
    for row in ("no_sae", "on_1024", "off_1024"):
        assert (metrics.loc[row] == other.loc[row]).all()
    assert not other.loc["on_50"].equals(metrics.loc["on_50"])


def test_predictions_and_the_summary_say_what_the_tables_say(steered: Path) -> None:
    metrics = pd.read_csv(steered / "metrics.csv", index_col="masking")
    predictions = pd.read_parquet(steered / "predictions.parquet")
    assert predictions["position"].tolist() == list(range(69))
    assert predictions["path"].iloc[0] == "0_red_circle/000.png"
    assert [int(path.split("_")[0]) for path in predictions["path"]] == predictions["label"].tolist()
    for row in metrics.index:
        column = row if row == "no_sae" else f"class_{row}"
        right = predictions[column] == predictions["label"]
        assert np.allclose(100 * right.groupby(predictions["label"]).mean(), metrics.loc[row])
        assert ((predictions[f"{column}_margin"] > 0) == right).all()
    both = (predictions["random_42_on_50"] == predictions["label"]) / 2.0 + (
        predictions["random_43_on_50"] == predictions["label"]
    ) / 2.0
    random = pd.read_csv(steered / "metrics_random.csv", index_col="masking")
    assert np.allclose(100 * both.groupby(predictions["label"]).mean(), random.loc["on_50"])
    summary = json.loads((steered / "summary.json").read_text())
    assert (summary["images"], summary["classes_with_images"]) == (69, 6)
    assert list(summary["rankings"]) == ["class", "dataset", "random", "image", "predicted"]
    for row in metrics.index:
        found = summary["no_sae"] if row == "no_sae" else summary["rankings"]["class"]["settings"][row]
        for name, percent in (("mean_over_classes", metrics.loc[row].mean()), ("over_images", None)):
            assert found[name]["low"] <= found[name]["percent"] <= found[name]["high"]
            assert percent is None or found[name]["percent"] == pytest.approx(percent, abs=1e-5)


def test_the_run_is_in_mlflow_with_its_intervals(extracted: Path, steered: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{extracted / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (run,) = [run for run in runs if run.info.run_name == "steer"]
    summary = json.loads((steered / "summary.json").read_text())
    found = summary["rankings"]["predicted"]["settings"]["off_10"]["mean_over_classes"]
    for suffix, name in (("", "percent"), ("_low", "low"), ("_high", "high")):
        assert run.data.metrics[f"accuracy_predicted_off_10{suffix}"] == pytest.approx(found[name])
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    tables = {"metrics.csv", *(f"metrics_{name}.csv" for name in ("dataset", "random", "image", "predicted"))}
    assert artifacts >= {*tables, "summary.json", "masking_curve.png", "predictions.parquet"}


def test_rerun_is_done_and_another_run_is_refused(run_command: JobRunner, extracted: Path, features: Path) -> None:
    listing = {path: path.read_bytes() for path in features.iterdir()}
    again = run_command("extract", extracted, *golden_flags())
    assert again.code == 0
    assert "already finished" in again.out
    other = run_command("extract", extracted, *golden_flags(), "--threshold", "0.3")
    assert other.code == 2
    assert other.err.count("\n") == 1
    assert "threshold 0.2 there, 0.3 here" in other.err
    assert {path: path.read_bytes() for path in features.iterdir()} == listing


def test_released_layout_of_the_counts_is_read(
    run_command: JobRunner, tmp_path: Path, steered: Path, expected: dict[str, torch.Tensor]
) -> None:
    released = tmp_path / "cls_sae_cnt.npy"
    np.save(released, expected["cls_sae_cnt_classes_by_latents"].numpy().astype(np.float64))
    flags = ["--cls_wise_sae_activation_path", str(released), "--output_offset", OFFSET, "--topk", "10,all"]
    done = run_command("steer", tmp_path / "run", *golden_flags(), *flags)
    assert done.code == 0, done.err
    assert "classes_first" in done.out
    metrics = pd.read_csv(tmp_path / "run" / "eval_outputs" / "base" / "golden" / "metrics.csv", index_col="masking")
    whole = pd.read_csv(steered / "metrics.csv", index_col="masking")
    assert list(metrics.index) == ["no_sae", "on_10", "off_10", "on_1024", "off_1024"]
    assert np.allclose(metrics.to_numpy(), whole.loc[metrics.index].to_numpy())
