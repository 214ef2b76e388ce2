"""What a notebook does with the loaders: images in, gradients with respect to residuals and latents, clear errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from patchsae_ray import load_backbone, load_images, load_sae
from patchsae_ray.backbone.adapter import AdapterFiles, read_adapter
from patchsae_ray.backbone.clip import Backbone, build_clip
from patchsae_ray.backbone.config import resolve
from patchsae_ray.backbone.zero_shot import logits
from patchsae_ray.errors import UserError
from patchsae_ray.sae.model import SparseAutoencoder
from tests.conftest import GOLDEN

CONFIG, WEIGHTS = str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors")
MAPLE: dict[str, Any] = {
    "vit_type": "maple",
    "model_path": str(GOLDEN / "model.pth.tar-5"),
    "config_path": str(GOLDEN / "maple.yaml"),
}
FILES = sorted((GOLDEN / "images").glob("*/*.png"))


@pytest.fixture(scope="module", params=[{}, MAPLE], ids=["base", "maple"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(CONFIG, WEIGHTS, **request.param).double()


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return load_sae(str(GOLDEN / "sae.pt")).double()


def classifier(backbone: Backbone) -> Tensor:
    """The zero-shot classifier of the golden class names, plain or adapted, as the jobs make it."""
    config, weights = resolve(CONFIG, WEIGHTS)
    chosen = MAPLE if backbone.num_prompt_tokens else {"vit_type": "base", "model_path": None, "config_path": None}
    adapter = read_adapter(AdapterFiles(**chosen), config, weights.state_dict)
    return adapter.classifier(build_clip(config, weights.state_dict), config, ["red circle", "green square", "blue triangle"])


def check_along_its_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Autograd's derivative along the gradient against central differences, whose step changes `at` by a ten-thousandth."""
    leaf = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    direction = gradient / gradient.norm()
    step = 1e-3 * at.norm()
    ahead, behind = function(at + step * direction), function(at - step * direction)
    slope = ((ahead - behind) / (2 * step)).item()
    assert slope == pytest.approx(gradient.norm().item(), rel=2e-3)
    assert slope > 0


def test_a_logits_gradient_with_respect_to_the_residual(backbone: Backbone) -> None:
    residual, head = backbone.to_hook(load_images(FILES[:3], backbone)), classifier(backbone)
    check_along_its_gradient(lambda x: logits(backbone.from_hook(x), head, 0.0)[:, 2].sum(), residual)


def test_a_logits_gradient_with_respect_to_the_latents(backbone: Backbone, sae: SparseAutoencoder) -> None:
    residual, head = backbone.to_hook(load_images(FILES[:3], backbone)), classifier(backbone)
    check_along_its_gradient(lambda z: logits(backbone.from_hook(sae.decode(z)), head, 0.0)[:, 2].sum(), sae.encode(residual))


def test_a_linear_probe_on_residuals_learns() -> None:
    backbone = load_backbone(CONFIG, WEIGHTS)
    pixels, labels = load_images(FILES, backbone), torch.tensor([int(file.parent.name[0]) for file in FILES])
    x = backbone.to_hook(pixels).mean(dim=1)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    torch.manual_seed(0)
    probe = nn.Linear(backbone.width, 6)
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        loss = cross_entropy(probe(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(weight.grad is None for weight in backbone.parameters()), "the tower is frozen"


def test_under_inference_mode_nothing_changes(backbone: Backbone) -> None:
    pixels = load_images(FILES[:5], backbone)
    with torch.inference_mode():
        residual = backbone.to_hook(pixels)
        embedding = backbone.from_hook(residual)
    assert residual.is_inference()
    assert torch.equal(residual, backbone.to_hook(pixels))
    assert torch.equal(embedding, backbone(pixels))


def test_forward_of_the_autoencoder(sae: SparseAutoencoder) -> None:
    x = torch.randn(2, 3, sae.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))


def test_precision_and_device() -> None:
    low, full = load_backbone(CONFIG, WEIGHTS, precision="bf16"), load_backbone(CONFIG, WEIGHTS, device="cpu")
    assert low.dtype == torch.bfloat16
    pixels = load_images(FILES[:4], low)
    assert torch.equal(low.to_hook(pixels), full.cast(torch.bfloat16).to_hook(pixels))
    assert load_sae(str(GOLDEN / "sae.pt"), device="meta").W_dec.is_meta
    with pytest.raises(UserError, match="precision 'bf32': fp32, bf16, fp16 are known"):
        load_backbone(CONFIG, WEIGHTS, precision="bf32")


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (torch.rand(2, 32, 32, 3), r"pixels of torch.float32: torch.uint8 from 0 to 255"),
        (torch.zeros(2, 33, 32, 3, dtype=torch.uint8), r"pixels of shape \(2, 33, 32, 3\): \[n, 32, 32, 3\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"pixels of shape \(2, 3, 32, 32\): \[n, 32, 32, 3\]"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), r"pixels of shape \(32, 32, 3\): \[n, 32, 32, 3\]"),
    ],
)
def test_pixels_of_another_kind(backbone: Backbone, pixels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        backbone.to_hook(pixels)


def test_residuals_of_another_shape(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=rf"residuals of shape \(2, 5, 64\): \[n, {backbone.num_tokens}, {backbone.width}\]"):
        backbone.from_hook(torch.zeros(2, 5, 64))


class TestLoadImages:
    def test_a_folder_and_its_files_are_the_same(self) -> None:
        folder, files = load_images(GOLDEN / "images", 32), load_images([str(file) for file in FILES], 32)
        assert folder.dtype == torch.uint8
        assert folder.shape == (len(FILES), 32, 32, 3)
        assert torch.equal(folder, files)

    def test_a_data_set_by_name_and_a_limit(self) -> None:
        found = load_images("demo", 28, limit=5)
        assert found.shape == (5, 28, 28, 3)
        assert torch.equal(load_images(FILES, 32, limit=2), load_images(GOLDEN / "images", 32, limit=2))
        assert load_images([], 32).shape == (0, 32, 32, 3)

    def test_an_unreadable_file_is_named(self, tmp_path: Path) -> None:
        Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
        (tmp_path / "b.png").write_bytes(b"no image")
        for source in (tmp_path, [tmp_path / "a.png", tmp_path / "b.png"]):
            with pytest.raises(UserError, match=r"b\.png: not an image"):
                load_images(source, 32)

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere is not there"):
            load_images(tmp_path / "nowhere", 32)
        with pytest.raises(UserError, match=r"nowhere\.png"):
            load_images([tmp_path / "nowhere.png"], 32)
