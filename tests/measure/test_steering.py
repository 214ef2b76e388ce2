"""Steering in one pass against masking, dense decode and the whole tail, a setting at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import DecodedUnit, decode_unit
from patchsae_ray.errors import UserError
from patchsae_ray.measure import steering
from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.masking import masked_settings
from patchsae_ray.measure.rankings import Ranker, Ranking
from patchsae_ray.measure.steering import (
    Steerer,
    SteeringSettings,
    beside_the_sum,
    masked_residuals,
    prediction_columns,
)
from patchsae_ray.measure.steering_totals import SteeringTotals
from patchsae_ray.names import ErrorTerm, Tokens
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.ops import active_latents
from tests.conftest import GOLDEN

CLASSES = 6


@pytest.fixture(scope="module")
def unit() -> DecodedUnit:
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    return decode_unit(manifest.units[0], manifest.reading, 32)


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return Ranker(np.random.default_rng(0).integers(0, 9, (1024, CLASSES)), 1024, 3, "cpu")


def direct(
    backbone: Backbone, sae: SparseAutoencoder, residual: torch.Tensor, kept: torch.Tensor, tokens: slice,
    error_term: ErrorTerm, offset: float,
) -> torch.Tensor:  # fmt: skip
    """Embedding [n, e] with only the `kept` latents [n, s]: dense, and the whole of every block."""
    x = residual[:, tokens]
    z = sae.encode(x)
    replaced = residual.clone()
    replaced[:, tokens] = sae.decode(z * kept[:, None]) + offset
    if error_term == "add":
        replaced[:, tokens] += x - sae.decode(z)
    for block in backbone.visual.transformer.resblocks[backbone.hook_block + 1 :]:
        replaced = block(replaced)
    pooled, _ = backbone.visual._pool(replaced)
    return pooled @ backbone.visual.proj


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ks=st.lists(st.sampled_from([1, 2, 3, 50, 700, 1023, 1024, 2000]), min_size=1, max_size=5),
    images=st.integers(1, 3),
    kind=st.sampled_from(["all", "image", "patch", "cls"]),
    error_term=st.sampled_from(["none", "add"]),
    offset=st.sampled_from([0.0, 0.105131256516992]),
    block_layer=st.sampled_from([-3, -2, -1]),
)
def test_embeddings_equal_a_direct_implementation(
    sae: SparseAutoencoder, ks: list[int], images: int, kind: Tokens, error_term: ErrorTerm, offset: float, block_layer: int
) -> None:
    backbone = load_backbone(str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors"), block_layer)
    generator = torch.Generator().manual_seed(len(ks) + 10 * images)
    residual = backbone.to_hook(torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator))
    ranks = torch.stack([torch.randperm(1024, generator=generator) for _ in range(images)])
    tokens, ordered = backbone.token_slice(kind), sorted(ks)
    x = residual[:, tokens]
    active = active_latents(sae, x)
    rest = beside_the_sum(sae, x, active, error_term, offset)
    variants = masked_residuals(sae, residual, tokens, active, ranks, torch.tensor(ordered), rest)
    found = backbone.from_hook(variants.flatten(0, 1)).view(images, 2 * len(ordered), -1)
    for index, k in enumerate(ordered):
        for switch, kept in enumerate((ranks < k, ranks >= k)):
            wanted = direct(backbone, sae, residual, kept, tokens, error_term, offset)
            assert (found[:, 2 * index + switch] - wanted).abs().max() < 1e-4


def steer(
    backbone: Backbone, sae: SparseAutoencoder, ranker: Ranker, unit: DecodedUnit, labels: np.ndarray | None = None,
    batch_size: int = 16, **changes: Any,
) -> SteeringTotals:  # fmt: skip
    given: dict[str, Any] = {
        "ks": (1, 50, 1024), "rankings": (Ranking("class"), Ranking("random", 2)), "intervene": "all",
        "error_term": "none", "output_offset": 0.0, "predictions": True, **changes,
    }  # fmt: skip
    classifier = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(0))[:, : backbone.visual.proj.shape[1]]
    steerer = Steerer(backbone, sae, classifier, 2.0, ranker, SteeringSettings(**given), batch_size)
    arrays, seconds = steerer.unit(unit.pixels, unit.positions, unit.labels if labels is None else labels)
    if labels is None:
        assert {"copy", "to_hook", "encode", "rank", "decode_latents", "from_hook", "reduce"} <= set(seconds)
    totals = SteeringTotals()
    totals.add(from_bytes(to_bytes(arrays)))
    return totals


def test_batches_and_chunks_change_nothing(
    backbone: Backbone, sae: SparseAutoencoder, ranker: Ranker, unit: DecodedUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = steer(backbone, sae, ranker, unit)
    monkeypatch.setitem(steering.VARIANT_BYTES, "cpu", 1)
    monkeypatch.setattr(steering, "KS_AT_ONCE", 2)
    one = steer(backbone, sae, ranker, unit, batch_size=7)
    first, second = many.predictions(), one.predictions()
    assert first is not None
    assert second is not None
    assert np.array_equal(first.classes, second.classes)
    assert np.allclose(first.margins, second.margins, atol=1e-4)
    for name, accuracy in many.accuracy.items():
        for sums, parted in zip(accuracy.to_arrays().values(), one.accuracy[name].to_arrays().values(), strict=True):
            assert np.array_equal(sums, parted)


def test_predictions_and_counts_say_the_same(
    backbone: Backbone, sae: SparseAutoencoder, ranker: Ranker, unit: DecodedUnit
) -> None:
    totals = steer(backbone, sae, ranker, unit)
    predictions = totals.predictions()
    assert predictions is not None
    names = masked_settings((1, 50, 1024))
    columns = prediction_columns((Ranking("class"), Ranking("random", 2)), names, seed=3)
    assert columns[:2] == ["no_sae", "class_on_1"]
    assert columns[-1] == "random_4_off_1024"
    assert predictions.classes.shape == (69, len(columns))
    right = predictions.classes == predictions.labels[:, None]
    assert np.array_equal(right, predictions.margins > 0)
    assert 0 < right.mean() < 1
    table = totals.accuracy["random"].table((1, 50, 1024))
    for setting in names:
        both = [columns.index(f"random_{seed}_{setting}") for seed in (3, 4)]
        assert np.mean(right[:, both]) == pytest.approx(
            np.average(table.loc[setting], weights=totals.accuracy["random"].images) / 100
        )


def test_every_ranking_runs_and_all_latents_are_the_same_in_any_order(
    backbone: Backbone, sae: SparseAutoencoder, ranker: Ranker, unit: DecodedUnit
) -> None:
    names = ("class", "dataset", "random", "image", "predicted")
    totals = steer(backbone, sae, ranker, unit, rankings=tuple(map(Ranking, names)), intervene="patch", error_term="add")
    tables = [totals.accuracy[name].table((1, 50, 1024)) for name in names]
    for table in tables:
        assert np.allclose(table.loc["on_1024"], tables[0].loc["no_sae"]), "with the error put back nothing has changed"
        assert np.allclose(table.loc["off_1024"], tables[0].loc["off_1024"])
    assert len({tuple(table.loc["on_50"]) for table in tables}) > 2
    predictions = totals.predictions()
    assert predictions is not None
    columns = prediction_columns(tuple(map(Ranking, names)), masked_settings((1, 50, 1024)), 3)
    by = {name: predictions.classes[:, columns.index(f"{name}_on_50")] for name in ("class", "predicted")}
    told = predictions.classes[:, 0] == predictions.labels
    assert np.array_equal(by["class"][told], by["predicted"][told]), "where CLIP is right the two orders are the same"


def test_images_without_a_label_are_left_out(
    backbone: Backbone, sae: SparseAutoencoder, ranker: Ranker, unit: DecodedUnit
) -> None:
    labels = np.where(np.arange(69) % 3 == 0, -1, unit.labels)
    totals = steer(backbone, sae, ranker, unit, labels)
    assert totals.accuracy["class"].images.sum() == 46
    predictions = totals.predictions()
    assert predictions is not None
    assert predictions.positions.tolist() == [position for position in range(69) if position % 3]
    none = steer(backbone, sae, ranker, unit, np.full(69, -1))
    assert none.accuracy["class"].images.sum() == 0


def test_a_label_without_a_class(backbone: Backbone, sae: SparseAutoencoder, ranker: Ranker, unit: DecodedUnit) -> None:
    with pytest.raises(UserError, match="position 0: its label is 6, but there are 6 class names"):
        steer(backbone, sae, ranker, unit, np.full(69, 6))
