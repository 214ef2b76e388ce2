"""PatchSAE's own size: ViT-B/16 with random weights and 49,152 latents, 64 images, in bounded memory."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.sae.checkpoint import safetensors_bytes
from patchsae_ray.sae.model import SparseAutoencoder, initialise
from tests.conftest import JobRunner
from tests.data.makers import CLASSES, picture, write

pytestmark = pytest.mark.ray

IMAGES, LATENTS, GIB = 64, 49_152, 2**30


def random_clip(path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"), quick_gelu=True)
    save_file({name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}, path)


def sparse_sae(path: Path, weights: Path) -> None:
    """Random directions, the encoder's bias such that about 150 latents are active on a token."""
    sae = SparseAutoencoder(768, LATENTS)
    initialise(sae, torch.Generator().manual_seed(0))
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = load_backbone("ViT-B-16", str(weights)).to_hook(pixels)[0]
    with torch.no_grad():
        sae.b_dec.copy_(tokens.mean(dim=0))
        level = torch.quantile(sae.pre_activations(tokens[::16]).flatten()[::7], 1 - 150 / LATENTS)
        sae.b_enc.fill_(-level.item())
    path.write_bytes(safetensors_bytes(sae, {"model_name": "openai/clip-vit-base-patch16", "block_layer": -2}))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("vit")
    for number in range(IMAGES):
        write(str(folder / "images" / CLASSES[number % 3] / f"{number:03d}.png"), picture(number, (256, 240)))
    random_clip(folder / "clip.safetensors")
    sparse_sae(folder / "sae.safetensors", folder / "clip.safetensors")
    data = ["--dataset_name", "noise", "--dataset_path", str(folder / "images")]
    model = ["--clip_weights", str(folder / "clip.safetensors"), "--sae_path", str(folder / "sae.safetensors")]
    return [*data, *model, "--batch_size", "16"]


def test_extract_and_steer(run_command: JobRunner, flags: list[str], tmp_path: Path) -> None:
    done = run_command("extract", tmp_path, *flags, "--figure_latents", "4", "--quality_images", "16")
    assert done.code == 0, done.err
    assert "backbone clip-vit-base-patch16" in done.out
    features = tmp_path / "out" / "feature_data" / "base" / "noise"
    counts = np.load(features / "cls_sae_cnt.npy")
    assert counts.shape == (LATENTS, 3)
    assert counts.max() <= IMAGES * 197
    record = json.loads((features / "run.json").read_text())["runs"]["extract"]
    assert 50 < record["summary"]["quality_l0"] < 500
    steered = run_command("steer", tmp_path, *flags, "--cls_wise_sae_activation_path", str(features / "cls_sae_cnt.npy"))
    assert steered.code == 0, steered.err
    metrics = pd.read_csv(tmp_path / "eval_outputs" / "base" / "noise" / "metrics.csv", index_col="masking")
    assert len(metrics) == 1 + 2 * 10
    assert metrics.index[-1] == f"off_{LATENTS}"
    steer_record = json.loads((tmp_path / "eval_outputs" / "base" / "noise" / "run.json").read_text())["runs"]["steer"]
    for job, one in {"extract": record, "steer": steer_record}.items():
        peaks = {name: peak / GIB for name, peak in one["peak_memory_bytes"].items()}
        print(f"{job}: peak GiB {peaks}, seconds {one['seconds']}")
        assert peaks["actor"] < 4
        assert peaks["driver"] < 4
