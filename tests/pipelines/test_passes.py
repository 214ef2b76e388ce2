"""What a pass over a data set does beyond the golden numbers: plan, order, bad images, labels, other forms of data."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch

from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.decoding import decoded_units
from patchsae_ray.pipelines.planning import Plan
from patchsae_ray.pipelines.progress import duration, progress_line
from patchsae_ray.pipelines.units import _Actor
from tests.conftest import GOLDEN, JobRunner, RayHead, golden_flags, golden_model_flags
from tests.data.makers import make_folder, parquet_bytes, picture, tar_bytes, write

pytestmark = pytest.mark.ray


@pytest.fixture
def joined(ray_head: RayHead) -> Iterator[None]:
    cluster.connect(ray_head.address)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("joined")
def test_decode_and_model_stay_two_operators(capfd: pytest.CaptureFixture[str]) -> None:
    plan = cluster.make_plan("auto")
    assert plan == Plan(
        "cpu", min_actors=1, max_actors=1, actor_cpus=1.5, actor_gpus=0.0, decode_cpus=0.5, threads=2, precision="fp32"
    )
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    rows = decoded_units(manifest, range(len(manifest.units)), 32, plan, None)
    mapped = rows.map_batches(
        _Actor, batch_size=1, num_cpus=plan.actor_cpus, compute=ray.data.ActorPoolStrategy(size=1),
        fn_constructor_args=(None, plan, None),
    )  # fmt: skip
    mapped.explain()
    physical = capfd.readouterr().out.split("Physical Plan")[-1]
    assert "Map(DecodeRow" in physical
    assert "MapBatches(_Actor)" in physical
    assert "->MapBatches" not in physical.replace(" ", ""), "decode and model were fused into one operator"


def features(root: Path, name: str) -> Path:
    return root / "out" / "feature_data" / "base" / name


def test_bad_images_are_recorded_and_bounded(run_command: JobRunner, tmp_path: Path) -> None:
    data = tmp_path / "images"
    make_folder(str(data), 12)
    (data / "ant" / "00001.png").write_bytes(picture(1)[:70])
    (data / "cat" / "00009.png").write_bytes(b"no image")
    flags = ["--dataset_name", "odd", "--dataset_path", str(data), *golden_model_flags()]
    refused = run_command("extract", tmp_path, *flags)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("error: 2 of 12 images cannot be read, the first ant/00001.png (")
    assert not list(features(tmp_path, "odd").glob("*.*")), "no results"
    done = run_command("extract", tmp_path, *flags, "--max_bad_fraction", "0.2")
    assert done.code == 0, done.err
    errors = pd.read_parquet(features(tmp_path, "odd") / "errors.parquet")
    assert errors["position"].tolist() == [1, 9]
    assert errors["path"].tolist() == ["ant/00001.png", "cat/00009.png"]
    assert errors["reason"].str.len().gt(0).all()
    top = torch.load(features(tmp_path, "odd") / "max_activating_image_indices.pt", weights_only=True)
    assert set(top.unique().tolist()) == {-1, 0, 2, 3, 4, 5, 6, 7, 8, 10, 11}


def test_images_without_labels(run_command: JobRunner, tmp_path: Path) -> None:
    for number in range(5):
        write(str(tmp_path / "flat" / f"{number}.png"), picture(number))
    flags = ["--dataset_name", "flat", "--dataset_path", str(tmp_path / "flat"), *golden_model_flags()]
    done = run_command("extract", tmp_path, *flags, "--figure_latents", "2", "--tokens", "cls")
    assert done.code == 0, done.err
    written = {path.name for path in features(tmp_path, "flat").iterdir()}
    assert "max_activating_image_indices.pt" in written
    assert not {"cls_sae_cnt.npy", "max_activating_image_label_indices.pt"} & written
    counted = run_command("class_latents", tmp_path, *flags)
    assert counted.code == 2
    assert "has no labels" in counted.err


def test_every_form_of_the_same_images_gives_the_same_counts(run_command: JobRunner, tmp_path: Path) -> None:
    labels = [number * 3 // 30 for number in range(30)]
    make_folder(str(tmp_path / "folder"), 30)
    write(str(tmp_path / "rows.parquet"), parquet_bytes(list(range(30)), list(labels)))
    write(str(tmp_path / "tars" / "0.tar"), tar_bytes(list(range(17)), labels[:17]))
    write(str(tmp_path / "tars" / "1.tar"), tar_bytes(list(range(17, 30)), labels[17:]))
    found = []
    for name in ("folder", "rows.parquet", "tars"):
        flags = ["--dataset_name", name, "--dataset_path", str(tmp_path / name), *golden_model_flags()]
        done = run_command("class_latents", tmp_path / "run", *flags, "--batch_size", "11")
        assert done.code == 0, done.err
        found.append(np.load(features(tmp_path / "run", name) / "cls_sae_cnt.npy"))
    assert found[0].shape == (1024, 3)
    assert found[0].sum() > 0
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_overwrite_replaces_and_forgets(run_command: JobRunner, tmp_path: Path) -> None:
    first = run_command("extract", tmp_path, *golden_flags(), "--quality_images", "0", "--figure_latents", "3")
    assert first.code == 0, first.err
    folder = features(tmp_path, "golden")
    before = np.load(folder / "cls_sae_cnt.npy")
    flags = ["--threshold", "0.5", "--figure_latents", "0"]
    second = run_command("extract", tmp_path, *golden_flags(), *flags, "--overwrite", "--precision", "bf16")
    assert second.code == 0, second.err
    assert np.load(folder / "cls_sae_cnt.npy").sum() < before.sum()
    assert not (folder / "top_images.png").exists(), "a file that the new run does not make is not left as if it were its own"
    state = json.loads((folder / "run.json").read_text())
    assert set(state["files"]) == {path.name for path in folder.iterdir()} - {"run.json"}
    assert state["runs"]["extract"]["identity"]["precision"] == "bf16"
    assert state["runs"]["extract"]["summary"]["quality_explained_variance"] == pytest.approx(0.9746, abs=5e-3)


def test_progress_lines() -> None:
    assert progress_line("extract", 1024, 10_000, 620, 2.0) == "extract: 1,024/10,000 images, 310.0 images/s, 29 s left"
    assert progress_line("extract", 5, 10, 0, 0.0) == "extract: 5/10 images"
    assert [duration(seconds) for seconds in (4.4, 61, 7385)] == ["4 s", "1 min 01 s", "2 h 03 min"]
