"""What is NaN or infinite is named by its image, in every kind of pass, and before it reaches a result."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.evaluation import EvaluationTotals
from patchsae_ray.measure.evaluator import Evaluator, ResidualSummer, ZeroShotHead
from patchsae_ray.measure.extraction import ExtractionSettings, Extractor
from patchsae_ray.measure.image_errors import ImageError, check_finite
from patchsae_ray.measure.rankings import Ranker, Ranking
from patchsae_ray.measure.steering import Steerer, SteeringSettings
from patchsae_ray.pipelines import cached
from patchsae_ray.pipelines.bundles import BundleFolder, Notes, pack
from patchsae_ray.pipelines.merging import combine, naming_the_image
from patchsae_ray.sae.model import SparseAutoencoder
from tests.conftest import GOLDEN

CLASSES = 6
Run = Callable[[Backbone, SparseAutoencoder, DecodedUnit], Any]


@pytest.fixture(scope="module")
def unit() -> DecodedUnit:
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    return decode_unit(manifest.units[0], manifest.reading, 32)


def classifier(backbone: Backbone) -> torch.Tensor:
    return torch.randn(CLASSES, backbone.visual.proj.shape[1], generator=torch.Generator().manual_seed(0))


def extract(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> Any:
    settings = ExtractionSettings("all", (0.2,), 3, np.zeros(0, np.int64))
    return Extractor(backbone, sae, settings, 16).unit(unit.pixels, unit.positions, unit.labels)


def steer(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> Any:
    settings = SteeringSettings((1, 1024), (Ranking("random", 2),), "all", "none", 0.0, False)
    steerer = Steerer(backbone, sae, classifier(backbone), 2.0, Ranker(None, 1024, 0, "cpu"), settings, 16)
    return steerer.unit(unit.pixels, unit.positions, unit.labels)


def evaluate(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> Any:
    head = ZeroShotHead(classifier(backbone), 2.0, torch.zeros(2, 128))
    return Evaluator(backbone, sae, "all", 16, head).unit(unit.pixels, unit.positions, unit.labels)


def measure(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> Any:
    return Evaluator(backbone, sae, "all", 16).unit(unit.pixels, unit.positions, unit.labels)


def add_up(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> Any:
    return ResidualSummer(backbone, "all", 16, "cpu").unit(unit.pixels, unit.positions)


def cache(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> Any:
    class Model:
        def build_backbone(self, device: str) -> Backbone:
            return backbone

    task = cached.CacheTask(Model(), "all", "bf16", 16, "/nowhere", "")  # type: ignore[arg-type]
    return task.start("cpu").process(unit, lambda images: None)


def spoil(monkeypatch: pytest.MonkeyPatch, backbone: Backbone, value: float) -> None:
    """One element of the tenth image of each whole batch, so of position 9 of the unit first."""
    plain = backbone.to_hook

    def spoilt(pixels: torch.Tensor) -> torch.Tensor:
        x = plain(pixels).clone()
        if len(x) == 16:
            x[9, 3, 5] = value
        return x

    monkeypatch.setattr(backbone, "to_hook", spoilt)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("run", [extract, steer, evaluate, measure, add_up, cache])
def test_residuals(
    run: Run, value: float, backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, backbone, value)
    said = "activations" if run is cache else "residuals"
    with pytest.raises(ImageError, match=f"the image at position 9: its {said} are not finite"):
        run(backbone, sae, unit)


@pytest.mark.parametrize(("run", "said"), [(extract, "latents"), (steer, "scores"), (evaluate, "rec"), (measure, "rec")])
def test_latents_past_half_precision(
    run: Run, said: str, backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit
) -> None:
    """Finite residuals and finite weights, whose product is more than fp16 holds."""
    tensors = {name: value.clone() for name, value in sae.state_dict().items()}
    tensors["W_enc"][:, 700] *= 6e4 / tensors["W_enc"][:, 700].abs().max()
    large = SparseAutoencoder.from_tensors(tensors).cast_encoder(torch.float16)
    assert large.W_enc.isfinite().all()
    with pytest.raises(ImageError, match=rf"the image at position \d+: its {said}\w* are not finite"):
        run(backbone, large, unit)


def test_an_image_error_travels_and_is_named(tmp_path: Path) -> None:
    error = ImageError(9, "its residuals are not finite")
    again = copy.copy(error)
    assert (again.position, str(again)) == (9, str(error)), "it can be made again, as on its way between processes"

    class Block:
        def __getitem__(self, name: str) -> Any:
            return self

        def to_pylist(self) -> list[bytes]:
            return [pack(from_bytes(to_bytes(error.to_arrays())), Notes([0], 1))]

    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    said = r"the image at position 9 \(1_green_square/000.png\): its residuals are not finite"
    with pytest.raises(UserError, match=said) as raised, naming_the_image(manifest):
        combine(BundleFolder(str(tmp_path), 1), EvaluationTotals, Block())
    assert type(raised.value) is UserError, "a job prints it as one line"
    assert not list(tmp_path.iterdir()), "nothing is committed"


def test_check_finite() -> None:
    positions = np.array([10, 20, 30])
    check_finite(positions, residuals=torch.full((3, 2, 2), 6e4, dtype=torch.float16), latents=torch.zeros(3, 0))
    check_finite(positions[:0], scores=torch.zeros(0, 4))
    with pytest.raises(ImageError, match="position 20: its latents are not finite"):
        check_finite(
            positions, residuals=torch.tensor([[0.0], [0.0], [torch.nan]]),
            latents=torch.tensor([[0.0, 1], [torch.inf, -torch.inf], [0, 0]]),
        )  # fmt: skip
