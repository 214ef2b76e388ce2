"""The sums of an evaluation by themselves: merged in any order, and read at the edges of their definitions."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.evaluation import EvaluationTotals, TokenMetrics, TokenResult, objective_terms
from patchsae_ray.measure.recovered import ZeroShotMetrics, conditions_of, loss_recovered
from patchsae_ray.sae.ops import ActiveLatents
from patchsae_ray.sae.window import LOG_DENSITY_EDGES


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12), cuts=st.sets(st.integers(1, 11)), data=st.data())
def test_any_split_and_order_of_merging_gives_the_same(seed: int, n: int, cuts: set[int], data: st.DataObject) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < n), n]
    order = data.draw(st.permutations(list(pairwise(edges))))
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, n, 3, 4, generator=generator, dtype=torch.float64) * 1e3
    z = torch.relu(torch.randn(n, 3, 5, generator=generator) - 0.5)
    scores, labels = torch.randn(2, n, 3, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    types = torch.tensor([0, 1, 1])

    def one(rows: slice) -> EvaluationTotals:
        made = EvaluationTotals()
        made.tokens, made.zero_shot = TokenMetrics(2, 4, 5), ZeroShotMetrics(2, 3)
        for row in range(rows.start, rows.stop):  # an image at a time, so that all sums have the same terms
            token, latent = z[row].nonzero(as_tuple=True)
            active = ActiveLatents(token, latent, z[row][token, latent], 3)
            made.tokens.update(x[row : row + 1], other[row : row + 1], active, types)
            made.zero_shot.update(scores[:, row : row + 1], labels[row : row + 1])
        return made

    merged = EvaluationTotals()
    for low, high in order:
        merged.add(from_bytes(to_bytes(one(slice(low, high)).to_arrays())))
    plain = one(slice(0, n))
    assert merged.tokens is not None
    assert plain.tokens is not None
    assert merged.zero_shot is not None
    assert plain.zero_shot is not None
    conditions = conditions_of(["cls"])[:2]
    assert repr(merged.tokens.result(["cls", "patch"])) == repr(plain.tokens.result(["cls", "patch"])), (
        "one token has no variance: NaN"
    )
    assert repr(merged.zero_shot.result(conditions)) == repr(plain.zero_shot.result(conditions)), (
        "one image has no interval: NaN"
    )
    assert merged.tokens.images.tolist() == [n]


def of_counts(fired: list[int], tokens: int) -> TokenResult:
    made = TokenMetrics(1, 1, len(fired))
    made.fired[0], made.tokens[0] = fired, tokens
    return made.result(["patch"])["all"]


def test_densities_fall_into_half_decades() -> None:
    tokens = 10**8
    fired = [0, 0, 1, 10, 31, 32, 10**5, 10**7, 10**7 + 1, 31_622_776, 31_622_777, 10**8]
    found = of_counts(fired, tokens)
    lower = {edge: found.density[index] for index, edge in enumerate(LOG_DENSITY_EDGES[:-1].tolist()) if found.density[index]}
    assert lower == {-7: 3, -6.5: 1, -3: 1, -1: 3, -0.5: 2}
    assert found.never == 2
    assert found.dead_share == pytest.approx(2 / 12)
    assert found.dense_share == pytest.approx(4 / 12), "10 % itself is not dense"


def test_objective_weighs_the_cls_token() -> None:
    values: dict[str, Any] = {
        "explained_variance": 0.0, "explained_variance_legacy": 0.0, "cosine": 0.0, "l0": 0.0,
        "dead_share": 0.0, "dense_share": 0.0, "density": (), "never": 0,
    }  # fmt: skip
    found = {
        "all": TokenResult(num_tokens=10, mse=0.3, l1=5.0, **values),
        "cls": TokenResult(num_tokens=2, mse=0.5, l1=1.0, **values),
    }
    assert objective_terms(found, 0.1, 1.0) == pytest.approx({"mse_loss": 0.3, "l1_loss": 0.5, "loss": 0.8})
    assert objective_terms(found, 0.1, 4.0)["mse_loss"] == pytest.approx((0.3 * 10 + 3 * 0.5 * 2) / 10)
    assert objective_terms({"all": found["all"]}, 0.1, 4.0)["mse_loss"] == pytest.approx(0.3)


def test_loss_recovered_is_undefined_where_the_ablation_costs_nothing() -> None:
    assert loss_recovered(3.0, 1.5, 1.0) == pytest.approx(0.75)
    assert loss_recovered(3.0, 4.0, 1.0) == pytest.approx(-0.5)
    for ablated in (1.0, 0.9):
        assert math.isnan(loss_recovered(ablated, 1.5, 1.0))


def test_tokens_of_zeros_and_identical_ones() -> None:
    x = torch.tensor([[3.0, 4.0]]).expand(4, 2, 2)
    zeros = torch.cat([x, torch.zeros(4, 2, 2)])
    nothing = ActiveLatents(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0), 8)
    found = {}
    for name, tokens in (("same", x), ("zeros", zeros)):
        metrics = TokenMetrics(1, 2, 3)
        metrics.update(tokens, tokens + 1, nothing, torch.tensor([0, 0]))
        found[name] = metrics.result(["patch"])["all"]
    assert math.isnan(found["same"].explained_variance)
    assert found["same"].mse == pytest.approx(2 / 5 / 2)
    assert found["zeros"].mse == pytest.approx(found["same"].mse / 2)
    assert found["zeros"].explained_variance_legacy == pytest.approx((1 - 2 / 25) / 2), "a token of zeros adds nothing"


def scored(seed: int, n: int, classes: int, quality: float) -> ZeroShotMetrics:
    """Images of classes in turn, under conditions whose scores know more or less of the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, classes, generator=generator) + 0.5 * torch.randn(4, n, classes, generator=generator)
    known = torch.nn.functional.one_hot(labels, classes) * torch.tensor([quality, 0.8 * quality, 0.0, 0.2])[:, None, None]
    made = ZeroShotMetrics(4, classes)
    for rows in (slice(0, n // 3), slice(n // 3, n)):
        made.update((noise + known)[:, rows], labels[rows])
    return made


CONDITIONS = conditions_of(["cls"])


def test_intervals_are_those_of_drawing_images_again() -> None:
    n, classes = 2000, 5
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    known = torch.nn.functional.one_hot(labels, classes) * torch.tensor([2.0, 1.6, 0.0, 0.2])[:, None, None]
    scores = known + torch.randn(n, classes, generator=generator) + 0.5 * torch.randn(4, n, classes, generator=generator)
    metrics = ZeroShotMetrics(4, classes)
    metrics.update(scores, labels)
    found = metrics.result(CONDITIONS)
    assert found is not None
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1).double(), labels.repeat(4), reduction="none").view(4, n)
    right, drawn = (scores.argmax(dim=2) == labels).double(), []
    for _ in range(2000):
        rows = torch.randint(0, n, (n,), generator=generator)
        loss = losses[:, rows].mean(dim=1)
        drawn.append([*right[:, rows].mean(dim=1), *loss, (loss[2] - loss[1]) / (loss[2] - loss[0])])
    low, high = torch.tensor(drawn).double().quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
    names = [condition.name for condition in CONDITIONS]
    wanted = dict(zip([*(("top1", name) for name in names), *(("contrastive_loss", name) for name in names)],
                      zip(low.tolist(), high.tolist(), strict=True), strict=False))  # fmt: skip
    for (metric, name), bounds in wanted.items():
        assert found.intervals[metric][name] == pytest.approx(bounds, abs=0.004), (metric, name)
    assert found.intervals["loss_recovered"]["zero_ablation"] == pytest.approx((low[-1].item(), high[-1].item()), abs=0.004)


def test_intervals_hold() -> None:
    """By how often they hold the value that very many images have."""
    truth = scored(1, 60_000, 5, 2.0).result(CONDITIONS)
    assert truth is not None
    hits = dict.fromkeys(["top1", "top1_mean_over_classes", "contrastive_loss", "loss_recovered"], 0)
    for seed in range(300):
        found = scored(100 + seed, 60, 5, 2.0).result(CONDITIONS)
        assert found is not None
        for metric in hits:
            name = "mean_ablation" if metric == "loss_recovered" else "reconstruction"
            value = truth.loss_recovered(name) if metric == "loss_recovered" else getattr(truth, metric)[name]
            low, high = found.intervals[metric][name]
            hits[metric] += low <= value <= high
    assert all(0.91 <= count / 300 <= 0.99 for count in hits.values()), hits


def test_one_image_has_no_interval() -> None:
    found = scored(0, 1, 3, 2.0).result(CONDITIONS)
    assert found is not None
    assert all(math.isnan(bound) for of_metric in found.intervals.values() for pair in of_metric.values() for bound in pair)
