"""The guide's commands, plain and adapted CLIP, the page that compares them, and a job submitted to a head with token auth."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae_ray.demo import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.conftest import GOLDEN, ROOT, RayHead, golden_flags

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ready_mlflow: Path) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    shutil.copy(ready_mlflow, folder / "mlflow.db")
    return folder


def guide(ray_head: RayHead, home: Path, job: str, *flags: str) -> str:
    """`PYTHONPATH=./ python jobs/….py …`, typed in a folder of one's own."""
    environment = {**ray_head.environment, "RAY_ADDRESS": ray_head.address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(ray_head: RayHead, home: Path) -> Path:
    """The folder after the guide's commands with plain CLIP."""
    # The guide's training command has no flags; the length alone is cut here, and run_name names the folder.
    guide(ray_head, home, "train", "--total_training_images", "12000", "--run_name", "guide")
    sae = ["--sae_path", "out/checkpoints/guide/sae.pt"]
    data = ["--root_dir", "./", "--dataset_name", "demo"]
    guide(ray_head, home, "extract", *data, *sae, "--vit_type", "base")
    out = guide(ray_head, home, "class_latents", *data, "--threshold", "0.2", *sae, "--vit_type", "base")
    assert "already finished" in out
    counts = ["--cls_wise_sae_activation_path", "out/feature_data/base/demo/cls_sae_cnt.npy"]
    guide(ray_head, home, "steer", *data, *sae, *counts, "--split", "test")
    return home


def test_the_guides_commands(plain: Path) -> None:
    home = plain
    features = home / "out" / "feature_data" / "base" / "demo"
    for name in (
        "max_activating_image_indices", "max_activating_image_label_indices", "max_activating_image_values",
        "sae_mean_acts", "sae_sparsity",
    ):  # fmt: skip
        assert len(torch.load(features / f"{name}.pt", weights_only=True)) == 1024
    assert np.load(features / "cls_sae_cnt.npy").shape == (1024, 10)
    metrics = pd.read_csv(home / "eval_outputs" / "base" / "demo" / "metrics.csv", index_col="masking")
    assert list(metrics.index[-2:]) == ["on_1024", "off_1024"]
    assert metrics.loc["no_sae"].mean() > 85
    assert metrics.loc["off_1024"].mean() < 15
    record = json.loads((home / "eval_outputs" / "base" / "demo" / "run.json").read_text())["runs"]["steer"]
    extracted = json.loads((features / "run.json").read_text())["runs"]["extract"]
    assert record["counts_run_key"] == extracted["run_key"]
    assert record["identity"]["sae"] == extracted["identity"]["sae"]


@pytest.fixture(scope="module")
def adapted(ray_head: RayHead, plain: Path) -> Path:
    """The same folder after the guide's commands with adapted CLIP, and the comparison."""
    home = plain
    data = ["--root_dir", "./", "--dataset_name", "demo", "--sae_path", "out/checkpoints/guide/sae.pt"]
    maple = ["--vit_type", "maple", "--model_path", str(ADAPTER_WEIGHTS), "--config_path", str(ADAPTER_CONFIG)]
    guide(ray_head, home, "extract", *data, *maple)
    out = guide(ray_head, home, "class_latents", *data, "--threshold", "0.2", *maple)
    assert "already finished" in out
    counts = "out/feature_data/maple/demo/cls_sae_cnt.npy"
    guide(ray_head, home, "steer", *data, "--cls_wise_sae_activation_path", counts, *maple, "--split", "test")
    out = guide(ray_head, home, "compare", "--root_dir", "./", "--dataset_name", "demo")
    assert "With maple accuracy goes from" in out
    return home


def test_the_guides_commands_for_adapted_clip(adapted: Path) -> None:
    assert np.load(adapted / "out/feature_data/maple/demo/cls_sae_cnt.npy").shape == (1024, 10)
    metrics = pd.read_csv(adapted / "eval_outputs" / "maple" / "demo" / "metrics.csv", index_col="masking")
    assert metrics.loc["no_sae"].mean() > 85
    assert metrics.loc["off_1024"].mean() < 15


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1200, 420])
def test_the_page_reads_well_in_a_browser(adapted: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    page_file = adapted / "out" / "compare" / "maple" / "demo" / "all" / "compare.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else faults.append(request.url))
        page.goto(page_file.as_uri())
        assert "With maple accuracy goes from" in page.locator(".finding").inner_text()
        images = page.locator("img")
        assert images.count() == 4
        assert all(images.nth(index).evaluate("image => image.complete && image.naturalWidth > 300") for index in range(4))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
        assert page.locator("table").count() >= 4
        assert not faults
        browser.close()


def submit(ray_head: RayHead, *entrypoint: str) -> "subprocess.CompletedProcess[str]":
    ray_command = str(Path(sys.executable).parent / "ray")
    command = [ray_command, "job", "submit", "--address", ray_head.dashboard, "--working-dir", str(ROOT), "--", *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=ray_head.environment, capture_output=True, text=True, timeout=400)


def test_a_submitted_job_does_what_it_does_here(ray_head: RayHead, tmp_path: Path, ready_mlflow: Path) -> None:
    shutil.copy(ready_mlflow, tmp_path / "mlflow.db")
    flags = ["--root_dir", str(tmp_path), *golden_flags()]
    done = submit(ray_head, "python", "jobs/extract.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "extract: 69 images" in done.stdout
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "expected" / "features_base.safetensors")
    counts = np.load(tmp_path / "out" / "feature_data" / "base" / "golden" / "cls_sae_cnt.npy")
    assert np.array_equal(counts, golden["cls_sae_cnt_classes_by_latents"].numpy().T)
    wrong = submit(ray_head, "python", "jobs/extract.py", *flags, "--threshold", "0.3")
    assert wrong.returncode != 0
    assert "exit code 2" in wrong.stdout + wrong.stderr
    assert "threshold 0.2 there, 0.3 here" in wrong.stdout + wrong.stderr
    ignored = {**ray_head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    refused = submit(RayHead(ray_head.address, ray_head.dashboard, ignored), "python", "-c", "1")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
