"""The sums of an evaluation against dense float64 computations, an image and a condition at a time."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.errors import UserError
from patchsae_ray.measure import evaluator
from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.evaluation import EvaluationTotals, TokenMetrics, TokenResult
from patchsae_ray.measure.evaluator import Evaluator, MeanTotals, ResidualSummer, ZeroShotHead
from patchsae_ray.measure.recovered import ZeroShotResult, conditions_of
from patchsae_ray.names import Tokens
from patchsae_ray.sae.model import SparseAutoencoder
from tests.conftest import GOLDEN

CLASSES = 6
SCALE = 4.0


@pytest.fixture(scope="module")
def maple() -> Backbone:
    files = {"model_path": str(GOLDEN / "model.pth.tar-5"), "config_path": str(GOLDEN / "maple.yaml")}
    return load_backbone(str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors"), vit_type="maple", **files)


@pytest.fixture(scope="module")
def unit() -> DecodedUnit:
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    return decode_unit(manifest.units[0], manifest.reading, 32)


def head_of(backbone: Backbone, unit: DecodedUnit, tokens: Tokens) -> ZeroShotHead:
    """A classifier of the classes' own mean embeddings, and the means of the residuals through the first pass's sums."""
    embeddings = normalize(backbone.from_hook(backbone.to_hook(torch.from_numpy(unit.pixels))), dim=-1)
    classifier = torch.stack([embeddings[torch.from_numpy(unit.labels == label)].mean(dim=0) for label in range(CLASSES)])
    totals, summer = MeanTotals(), ResidualSummer(backbone, tokens, 16, "cpu")
    for part in (slice(0, 40), slice(40, None)):
        totals.add(from_bytes(to_bytes(summer.unit(unit.pixels[part], unit.positions[part])[0])))
    means = totals.means()
    assert means is not None
    return ZeroShotHead(classifier, SCALE, torch.tensor(means, dtype=torch.float32))


def evaluate(
    backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit, tokens: Tokens = "all",
    labels: np.ndarray | None = None, batch_size: int = 16, head: ZeroShotHead | None = None,
) -> tuple[dict[str, TokenResult], ZeroShotResult | None]:  # fmt: skip
    head = head or head_of(backbone, unit, tokens)
    done: list[int] = []
    arrays, seconds = Evaluator(backbone, sae, tokens, batch_size, head).unit(
        unit.pixels, unit.positions, unit.labels if labels is None else labels, done.append
    )
    assert done == sorted(done)
    assert done[-1] == len(unit.pixels)
    assert {"copy", "to_hook", "encode", "decode_latents", "reduce", "from_hook"} <= set(seconds)
    totals = EvaluationTotals()
    totals.add(from_bytes(to_bytes(arrays)))
    assert totals.tokens is not None
    assert totals.zero_shot is not None
    assert totals.tokens.images.tolist() == [len(unit.pixels)]
    types = backbone.token_types(tokens)[0]
    return totals.tokens.result(types), totals.zero_shot.result(conditions_of(types))


def dense(sae: SparseAutoencoder, x: torch.Tensor) -> dict[str, float]:
    """The metrics of tokens x [m, d] float64, from the definitions alone."""
    weights = {name: value.to(torch.float64) for name, value in sae.state_dict().items()}
    z = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    other = z @ weights["W_dec"] + weights["b_dec"]
    lengths, error = x.norm(dim=1), (other - x).norm(dim=1)
    share = (z > 0).to(torch.float64).mean(dim=0)
    return {
        "num_tokens": len(x),
        "mse": ((other - x) ** 2 / lengths[:, None]).mean().item(),
        "explained_variance": (1 - (error**2).sum() / ((x - x.mean(dim=0)) ** 2).sum()).item(),
        "explained_variance_legacy": (1 - error**2 / lengths**2).mean().item(),
        "cosine": torch.cosine_similarity(x, other, dim=1).mean().item(),
        "l0": (z > 0).sum(dim=1).to(torch.float64).mean().item(),
        "l1": z.sum(dim=1).mean().item(),
        "dead_share": (share == 0).to(torch.float64).mean().item(),
        "dense_share": (share > 0.1).to(torch.float64).mean().item(),
        "never": int((share == 0).sum()),
    }


@pytest.mark.parametrize("tokens", ["all", "image", "patch", "cls"])
@pytest.mark.parametrize("adapter", ["base", "maple"])
def test_tokens_equal_a_dense_computation(
    adapter: str, tokens: Tokens, sae: SparseAutoencoder, unit: DecodedUnit, request: pytest.FixtureRequest
) -> None:
    tower: Backbone = request.getfixturevalue("backbone" if adapter == "base" else "maple")
    found, _ = evaluate(tower, sae, unit, tokens)
    residual = tower.to_hook(torch.from_numpy(unit.pixels)).to(torch.float64)
    end = residual.shape[1] - tower.num_prompt_tokens
    every = {"cls": residual[:, :1], "patch": residual[:, 1:end], "prompt": residual[:, end:]}
    wanted = {"all": ["cls", "patch", "prompt"], "image": ["cls", "patch"], "patch": ["patch"], "cls": ["cls"]}[tokens]
    parts = {kind: every[kind] for kind in wanted if every[kind].shape[1]}
    assert list(found) == ["all", *parts]
    for kind, x in {"all": torch.cat(list(parts.values()), dim=1), **parts}.items():
        values = asdict(found[kind])
        density = values.pop("density")
        assert values == pytest.approx(dense(sae, x.flatten(0, 1)), rel=2e-5), kind
        assert sum(density) + values["never"] == sae.d_sae


def direct_scores(backbone: Backbone, residual: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """[n, c] by the whole of every block."""
    for block in backbone.visual.transformer.resblocks[backbone.hook_block + 1 :]:
        residual = block(residual)
    pooled, _ = backbone.visual._pool(residual)
    return math.exp(SCALE) * normalize(pooled @ backbone.visual.proj, dim=-1) @ classifier.T


@pytest.mark.parametrize("tokens", ["all", "patch", "cls"])
def test_classification_equals_a_direct_computation(
    backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit, tokens: Tokens
) -> None:
    labels = np.where(np.arange(69) % 5 == 0, -1, unit.labels)
    _, found = evaluate(backbone, sae, unit, tokens, labels)
    assert found is not None
    where, true = labels >= 0, torch.from_numpy(labels[labels >= 0])
    assert (found.images, found.classes) == (int(where.sum()), 6)
    residual = backbone.to_hook(torch.from_numpy(unit.pixels))
    replaced = {"all": [0, *range(1, 17)], "patch": [*range(1, 17)], "cls": [0]}
    by_type = residual.mean(dim=0)
    by_type[1:] = residual[:, 1:].mean(dim=(0, 1))
    values = {"reconstruction": sae.decode(sae.encode(residual)), "zero": torch.zeros_like(residual), "mean": by_type}
    conditions = {"no_sae": ("zero", []), "reconstruction": ("reconstruction", replaced[tokens])}
    conditions |= {f"{name}_ablation": (name, replaced[tokens]) for name in ("zero", "mean")}
    if tokens == "all":
        conditions |= {f"reconstruction_{kind}": ("reconstruction", replaced[kind]) for kind in ("cls", "patch")}
    assert set(found.top1) == set(conditions)
    for name, (value, places) in conditions.items():
        variant = residual.clone()
        variant[:, places] = values[value].expand_as(residual)[:, places]
        scores = direct_scores(backbone, variant, head_of(backbone, unit, tokens).classifier)[where]
        right = scores.argmax(dim=1) == true
        assert found.top1[name] == pytest.approx(right.double().mean().item(), abs=1e-12), name
        of_class = [right[true == label].double().mean().item() for label in range(CLASSES)]
        assert found.top1_mean_over_classes[name] == pytest.approx(np.mean(of_class), abs=1e-12), name
        assert found.contrastive_loss[name] == pytest.approx(cross_entropy(scores, true).item(), rel=1e-5), name
    assert len({round(loss, 6) for loss in found.contrastive_loss.values()}) == len(conditions)


def signed(width: int) -> dict[str, torch.Tensor]:
    """relu(x) - relu(-x) = x: an autoencoder that loses nothing."""
    eye = torch.eye(width)
    return {
        "W_enc": torch.cat([eye, -eye], dim=1), "b_enc": torch.zeros(2 * width),
        "W_dec": torch.cat([eye, -eye]), "b_dec": torch.zeros(width),
    }  # fmt: skip


def test_a_perfect_reconstruction_recovers_everything(backbone: Backbone, unit: DecodedUnit) -> None:
    tokens, found = evaluate(backbone, SparseAutoencoder.from_tensors(signed(128)), unit)
    assert found is not None
    assert found.loss_recovered("zero_ablation") == pytest.approx(1, abs=1e-6)
    assert found.loss_recovered("mean_ablation") == pytest.approx(1, abs=1e-6)
    assert found.top1["reconstruction"] == found.top1["no_sae"]
    every = tokens["all"]
    assert (every.mse, every.explained_variance, every.explained_variance_legacy) == (0, 1, 1)
    assert every.cosine == pytest.approx(1)
    assert every.l0 == pytest.approx(128)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_a_reconstruction_that_is_the_ablation_recovers_nothing(backbone: Backbone, unit: DecodedUnit, ablation: str) -> None:
    head = head_of(backbone, unit, "cls")
    value = torch.zeros(128) if ablation == "zero" else head.means[0]
    tensors = {**signed(128), "W_dec": torch.zeros(256, 128), "b_dec": value}
    tokens, found = evaluate(backbone, SparseAutoencoder.from_tensors(tensors), unit, "cls", head=head)
    assert found is not None
    assert found.loss_recovered(f"{ablation}_ablation") == pytest.approx(0, abs=1e-6)
    other = {"zero": "mean_ablation", "mean": "zero_ablation"}[ablation]
    assert abs(found.loss_recovered(other)) > 1e-3
    assert tokens["cls"].explained_variance == pytest.approx(0, abs=1e-6) or ablation == "zero"
    assert tokens["cls"].cosine == 0 or ablation == "mean"


def test_parts_and_batches_change_nothing(
    backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, whole = evaluate(backbone, sae, unit)
    monkeypatch.setitem(evaluator.ACTIVE_BYTES, "cpu", 3 * 20 * 17 * 1024)
    few, parted = evaluate(backbone, sae, unit, batch_size=7)
    assert whole is not None
    assert parted is not None
    for kind, result in many.items():
        values, others = asdict(result), asdict(few[kind])
        assert values.pop("density") == others.pop("density")
        assert others == pytest.approx(values, rel=1e-5)
    assert (parted.top1, parted.classes) == (whole.top1, whole.classes)
    assert parted.contrastive_loss == pytest.approx(whole.contrastive_loss, rel=1e-5)


def test_nothing_measured_and_nothing_labelled(backbone: Backbone, sae: SparseAutoencoder, unit: DecodedUnit) -> None:
    assert TokenMetrics(2, 3, 4).result(["cls", "patch"]) == {}
    tokens, found = evaluate(backbone, sae, unit, labels=np.full(69, -1))
    assert found is None
    assert tokens["all"].num_tokens == 69 * 17
    with pytest.raises(UserError, match="the image at position 68: its label is 6, but there are 6 class names"):
        evaluate(backbone, sae, unit, labels=np.array([5] * 68 + [6]))
