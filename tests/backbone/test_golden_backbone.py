"""The backbone and its transform against the released code's residuals and text features."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.backbone.clip import Backbone, build_clip
from patchsae_ray.backbone.config import resolve
from patchsae_ray.backbone.zero_shot import text_embeddings
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.errors import UserError
from tests.conftest import GOLDEN

CONFIG, WEIGHTS = str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / "activations.safetensors")


@pytest.fixture(scope="module")
def unit() -> DecodedUnit:
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    return decode_unit(manifest.units[0], manifest.reading, 32)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(CONFIG, WEIGHTS)


def test_residuals(backbone: Backbone, unit: DecodedUnit, golden: dict[str, torch.Tensor]) -> None:
    expected = golden["hook_activations"]
    residual = backbone.to_hook(torch.from_numpy(unit.pixels))
    assert residual.shape == expected.shape
    assert ((residual - expected).norm() / expected.norm()).item() < 1.5e-6


def test_text_features(golden: dict[str, torch.Tensor]) -> None:
    config, weights = resolve(CONFIG, WEIGHTS)
    classnames = ["red circle", "green square", "blue triangle", "yellow stripe", "purple ring", "white noise"]
    found = text_embeddings(build_clip(config, weights.state_dict), config, classnames)
    assert torch.allclose(found, golden["text_features"], rtol=0, atol=1e-6)
    assert (found.norm(dim=1) < 0.95).all(), "the mean over templates is not made unit length again"


@pytest.mark.parametrize("block_layer", [-4, -2, -1, 0, 3])
def test_hook_and_tail_make_the_whole_tower(unit: DecodedUnit, block_layer: int) -> None:
    config, weights = resolve(CONFIG, WEIGHTS)
    whole = build_clip(config, weights.state_dict)
    cut = load_backbone(CONFIG, WEIGHTS, block_layer)
    pixels = torch.from_numpy(np.array(unit.pixels[:9]))
    normalised = (pixels.permute(0, 3, 1, 2) / 255 - cut.mean) / cut.std
    assert torch.allclose(cut.from_hook(cut.to_hook(pixels)), whole.encode_image(normalised), atol=5e-6)


def test_bf16_stays_close(backbone: Backbone, unit: DecodedUnit) -> None:
    pixels = torch.from_numpy(np.array(unit.pixels[:9]))
    low = load_backbone(CONFIG, WEIGHTS).cast(torch.bfloat16).to_hook(pixels).float()
    full = backbone.to_hook(pixels)
    assert ((low - full).norm() / full.norm()).item() < 2e-2


def test_token_kinds(backbone: Backbone) -> None:
    assert backbone.num_tokens == 17
    assert backbone.token_slice("all") == slice(0, 17)
    assert backbone.token_slice("image") == slice(0, 17)
    assert backbone.token_slice("patch") == slice(1, 17)
    assert backbone.token_slice("cls") == slice(0, 1)


@pytest.mark.parametrize("block_layer", [4, 99, -5])
def test_a_layer_the_model_lacks(block_layer: int) -> None:
    with pytest.raises(UserError, match=f"--block_layer {block_layer}: the model has 4 blocks"):
        load_backbone(CONFIG, WEIGHTS, block_layer)
