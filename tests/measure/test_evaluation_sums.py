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
    assert merged.zero_shot.result(conditions) == plain.zero_shot.result(conditions)
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
