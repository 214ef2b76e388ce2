"""`jobs/evaluate.py` on the golden case, against the same sums made here without Ray; and which images it reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchsae_ray.backbone.adapter import AdapterFiles, load_backbone, read_adapter
from patchsae_ray.backbone.clip import build_clip
from patchsae_ray.backbone.config import resolve
from patchsae_ray.cli import run_job
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.measure.evaluation import EvaluationTotals
from patchsae_ray.measure.evaluator import Evaluator, MeanTotals, ResidualSummer, ZeroShotHead
from patchsae_ray.measure.recovered import conditions_of
from patchsae_ray.pipelines import evaluate as job
from patchsae_ray.pipelines.evaluate_outputs import evaluation_metrics, log_summary, objective_of, rows_of, summarise
from patchsae_ray.pipelines.evaluate_worker import narrowed
from patchsae_ray.pipelines.extract import sample_positions
from patchsae_ray.sae.checkpoint import read_checkpoint
from patchsae_ray.settings import EvaluateSettings
from tests.conftest import GOLDEN, JobRunner, golden_flags, golden_model_flags
from tests.data.makers import make_folder, parquet_bytes, tar_bytes, write

SAE = str(GOLDEN / "sae.pt")
CLIP = (str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors"))


def here(manifest: Manifest, chosen: list[int] | None = None) -> dict[str, Any]:
    """The golden model's metrics on images of one unit, in this process, as evaluation.json holds them."""
    backbone, checkpoint = load_backbone(*CLIP), read_checkpoint(SAE)
    unit = decode_unit(manifest.units[0], manifest.reading, 32)
    rows = chosen if chosen is not None else list(range(len(unit.pixels)))
    pixels, positions, labels = unit.pixels[rows], unit.positions[rows], unit.labels[rows]
    head = None
    if manifest.classnames:
        means = MeanTotals()
        means.add(ResidualSummer(backbone, "all", 16, "cpu").unit(pixels, positions)[0])
        config, weights = resolve(*CLIP)
        adapter = read_adapter(AdapterFiles("base", None, None), config, weights.state_dict)
        classifier = adapter.classifier(build_clip(config, weights.state_dict), config, manifest.classnames)
        by_type = torch.tensor(means.means(), dtype=torch.float32)
        head = ZeroShotHead(classifier, float(weights.state_dict["logit_scale"]), by_type)
    totals, types = EvaluationTotals(), ("cls", "patch")
    totals.add(Evaluator(backbone, checkpoint.sae, "all", 16, head).unit(pixels, positions, labels)[0])
    assert totals.tokens is not None
    zero_shot = totals.zero_shot.result(conditions_of(types)) if totals.zero_shot else None
    return summarise(totals.tokens.result(types), zero_shot, objective_of(checkpoint.config), len(rows))


def close(found: Any, wanted: Any, where: str = "") -> None:
    """Nested values equal, numbers to rounding."""
    if isinstance(wanted, dict):
        assert set(found) >= set(wanted), where
        for key, value in wanted.items():
            close(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for one, value in zip(found, wanted, strict=True):
            close(one, value, where)
    else:
        assert found == (pytest.approx(wanted, rel=1e-5, abs=1e-7) if isinstance(wanted, float) else wanted), where


@pytest.fixture(scope="module")
def evaluated(run_command: JobRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    done = run_command("evaluate", root, *golden_flags(), "--batch_size", "20")
    assert done.code == 0, done.err
    assert "loss recovered" in done.out
    return root


@pytest.fixture(scope="module")
def folder(evaluated: Path) -> Path:
    return evaluated / "out" / "evaluation" / "base" / "golden" / read_checkpoint(SAE).digest[:8]


@pytest.mark.ray
def test_the_command_says_what_the_definitions_say(folder: Path) -> None:
    found = json.loads((folder / "evaluation.json").read_text())
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, str(GOLDEN / "classnames.json"))
    close(found, here(manifest))
    assert found["images"] == found["classification"]["images"] == 69
    steering = pd.read_csv(GOLDEN / "expected" / "metrics_base.csv", index_col="masking")
    assert 100 * found["classification"]["no_sae"]["top1_mean_over_classes"] == pytest.approx(steering.loc["no_sae"].mean())
    assert found["sparsity"]["all"]["dead_share"] == 65 / 1024
    assert found["objective"]["loss"] == pytest.approx(found["objective"]["mse_loss"] + found["objective"]["l1_loss"])


@pytest.mark.ray
def test_the_table_the_run_file_and_mlflow_agree(evaluated: Path, folder: Path) -> None:
    from mlflow import MlflowClient

    found = json.loads((folder / "evaluation.json").read_text())
    table = pd.read_csv(folder / "evaluation.csv", keep_default_na=False)
    rows = {(row.metric, row.tokens): float(str(row.value)) for row in table.itertuples()}
    assert rows[("cosine", "patch")] == found["reconstruction"]["patch"]["cosine"]
    assert rows[("top1_no_sae", "")] == found["classification"]["no_sae"]["top1"]
    assert rows[("contrastive_loss_reconstruction", "cls")] == found["classification"]["reconstruction_cls"]["contrastive_loss"]
    assert rows[("loss_recovered_mean_ablation", "all")] == found["classification"]["loss_recovered"]["mean_ablation"]
    assert len(rows) == len(table) == 1 + 3 * 8 + 3 + 1 + 6 * 3 + 2
    (row,) = [row for row in table.itertuples() if row.metric == "top1_no_sae"]
    assert [float(row.low), float(row.high)] == found["classification"]["intervals"]["top1"]["no_sae"]
    assert 0 <= float(row.low) < float(row.value) < float(row.high) <= 1
    state = json.loads((folder / "run.json").read_text())
    assert set(state["files"]) == {"evaluation.json", "evaluation.csv", "latent_density.png", "errors.parquet"}
    assert {path.name for path in folder.iterdir()} == {*state["files"], "run.json"}, "no bundles are left"
    assert state["runs"]["evaluate"]["summary"] == found
    assert pq.read_table(folder / "errors.parquet").num_rows == 0
    client = MlflowClient(f"sqlite:///{evaluated / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (run,) = [run for run in runs if run.info.run_name == "evaluate"]
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith("eval_")}
    assert metrics == pytest.approx(evaluation_metrics(rows_of(found, ("cls", "patch"))))
    assert metrics["eval_top1_reconstruction_cls"] == pytest.approx(rows[("top1_reconstruction", "cls")])


def in_process(capsys: pytest.CaptureFixture[str], flags: list[str]) -> tuple[int, str, str]:
    code = run_job(EvaluateSettings, job.evaluate, flags)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.ray
def test_again_is_done_and_another_run_is_refused(
    evaluated: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    listing = {path: path.read_bytes() for path in folder.iterdir()}
    flags = ["--root_dir", str(evaluated), *golden_flags()]
    for same in ([], ["--seed", "3"], ["--eval_images", "69"], ["--eval_images", "0"]):
        code, out, _ = in_process(capsys, [*flags, *same])
        assert code == 0
        assert "already finished" in out
    code, _, error = in_process(capsys, [*flags, "--tokens", "cls"])
    assert code == 2
    assert error.count("\n") == 1
    assert "tokens all there, cls here" in error
    assert in_process(capsys, [*flags, "--eval_images", "30"])[0] == 2
    assert {path: path.read_bytes() for path in folder.iterdir()} == listing


def test_the_last_lines_have_the_intervals_where_a_run_has_them(caplog: pytest.LogCaptureFixture) -> None:
    scores = {"top1": 0.5, "contrastive_loss": 1.0}
    classification = {
        "no_sae": scores,
        "reconstruction": scores,
        "loss_recovered": dict.fromkeys(["zero_ablation", "mean_ablation"]),
    }
    sparsity = {"all": {"l0": 1.0, "dead_share": 0.0, "dense_share": 0.0}}
    summary: dict[str, Any] = {
        "images": 3, "latents": 4, "reconstruction": {"all": {"explained_variance": None}}, "sparsity": sparsity,
        "classification": classification,
    }  # fmt: skip
    intervals = {"top1": {"no_sae": [0.25, 0.75], "reconstruction": [None, None]}}
    with caplog.at_level("INFO"):
        log_summary(summary, "here")
        log_summary({**summary, "classification": {**classification, "intervals": intervals}}, "here")
    lines = [line for line in caplog.messages if "top-1" in line]
    assert "top-1 50.00 % without the SAE, 50.00 % with" in lines[0], "a run that was finished before there were any"
    assert "top-1 50.00 % (25.00 to 75.00) without the SAE, 50.00 % with" in lines[1]


@pytest.mark.ray
def test_a_sample_of_images_without_labels(run_command: JobRunner, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted((GOLDEN / "images").glob("*/*.png"))[::3]):
        shutil.copy(path, flat / f"{index:02d}.png")
    flags = ["--dataset_name", "flat", "--dataset_path", str(flat), *golden_model_flags(), "--eval_images", "9", "--seed", "5"]
    done = run_command("evaluate", tmp_path / "run", *flags)
    assert done.code == 0, done.err
    assert "9 of 23 images" in done.out
    (written,) = (tmp_path / "run" / "out" / "evaluation" / "base" / "flat").glob("*/evaluation.json")
    found = json.loads(written.read_text())
    assert (found["images"], found["classification"]) == (9, None)
    close(found, here(open_dataset("flat", str(flat), None, None), sample_positions(23, 9, 5).tolist()))
    table = pd.read_csv(written.with_name("evaluation.csv"))
    assert not table["metric"].str.contains("top1|loss_recovered|contrastive").any()


@pytest.mark.ray
@pytest.mark.parametrize("job", ["evaluate", "extract"])
def test_weights_that_spoil_the_residuals_are_one_line(run_command: JobRunner, tmp_path: Path, job: str) -> None:
    weights = load_file(CLIP[1])
    weights["visual.positional_embedding"][3, 7] = torch.nan
    save_file(weights, tmp_path / "spoilt.safetensors")
    flags = golden_flags()
    flags[flags.index("--clip_weights") + 1] = str(tmp_path / "spoilt.safetensors")
    done = run_command(job, tmp_path / "run", *flags)
    assert done.code == 2
    (error,) = [line for line in done.err.splitlines() if "core_worker.cc" not in line]  # Ray's own line at every start
    assert error.startswith("error: the image at position 0 (0_red_circle/000.png): its residuals are not finite")
    written = [path for path in (tmp_path / "run").rglob("*.*") if "mlflow" not in str(path) and "manifests" not in str(path)]
    assert not written, "nothing is half written, and no bundle either"


def as_parquet(root: Path) -> None:
    for part in range(3):
        write(f"{root}/{part}.parquet", parquet_bytes(list(range(40 * part, 40 * part + 40)), [0, 1] * 20))


def as_tars(root: Path) -> None:
    for part in range(3):
        write(f"{root}/{part}.tar", tar_bytes(list(range(40 * part, 40 * part + 40)), [0, 1] * 20))


FORMS: dict[str, Callable[[Path], None]] = {
    "folder": lambda root: make_folder(str(root), 120), "parquet": as_parquet, "tar": as_tars,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sample", [[0], [37, 38, 119], list(range(0, 120, 3)), list(range(120))])
def test_a_sample_is_read_and_little_else(
    form: str, sample: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchsae_ray.data.manifest.UNIT_SIZE", 16)
    FORMS[form](tmp_path / "images")
    whole = open_dataset("x", str(tmp_path / "images"), None, None)

    def decoded(manifest: Manifest) -> list[DecodedUnit]:
        return [decode_unit(manifest.units.read(index), manifest.reading, 16) for index in range(len(manifest.units))]

    everything = decoded(whole)
    pixels = np.concatenate([unit.pixels for unit in everything])
    labels = np.concatenate([unit.labels for unit in everything])
    manifest, chosen = narrowed(whole, np.array(sample))
    read = decoded(manifest)
    measured = [chosen.of(unit) for unit in read]
    assert np.concatenate([unit.positions for unit in measured]).tolist() == sample
    assert np.array_equal(np.concatenate([unit.pixels for unit in measured]), pixels[sample])
    assert np.array_equal(np.concatenate([unit.labels for unit in measured]), labels[sample])
    assert all(unit.count <= 16 for unit in manifest.units)
    in_the_data_set = [chosen.place(int(position)) for unit in read for position in unit.positions]
    assert in_the_data_set == sample, "no other image is decoded"
    paths = [path for unit in manifest.units for path in manifest.paths(unit)]
    everywhere = [path for unit in whole.units for path in whole.paths(unit)]
    assert paths == [everywhere[position] for position in in_the_data_set]


def test_the_default_split_is_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def split(*flags: str) -> str | None:
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        return job.held_out_split(EvaluateSettings(sae_path="x.pt", **given))

    assert split("dataset_name", "demo") == "test"
    assert split("dataset_name", "imagenet") == "val", "the labels of ImageNet's test split are secret"
    assert split("dataset_name", "demo", "split", "train") == "train"
    assert split("dataset_name", "demo", "dataset_path", "/x") is None
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "whole.yaml").write_text("source: /x\nsplits: {train: a}\nsplit: train\n")
    monkeypatch.setenv("PATCHSAE_CONFIGS", str(tmp_path))
    assert split("dataset_name", "whole") is None


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    root = tmp_path / "root"
    flags = golden_flags()
    flags[flags.index("--sae_path") + 1] = str(tmp_path / "none.pt")
    code, _, error = in_process(capsys, ["--root_dir", str(root), *flags])
    assert (code, error) == (2, f"error: no such file: {tmp_path}/none.pt\n")
    code, _, error = in_process(capsys, ["--root_dir", str(root), *golden_flags(), "--eval_images", "-1"])
    assert (code, error) == (2, "error: --eval_images -1: at least 0 would be right\n")
    assert not root.exists()


def test_a_checkpoint_may_name_no_objective() -> None:
    assert objective_of({"l1_coefficient": 8e-5}) == {"l1_coefficient": 8e-5, "mse_cls_coefficient": 1.0}
    assert objective_of({"mse_cls_coefficient": 2.0}) is None
    assert objective_of({"l1_coefficient": "8e-5"}) is None
