"""Merging: the same integers and top lists for any split and order of the images, against a plain definition."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray.measure.arrays import from_bytes, prefixed, to_bytes, without_prefix
from patchsae_ray.measure.latents import LatentStatistics
from patchsae_ray.measure.quality import ReconstructionQuality
from patchsae_ray.measure.sums import CompensatedSum
from patchsae_ray.sae.ops import HISTOGRAM_BINS, ImageLatents

TYPE_SIZES = (1, 3)


def images(seed: int, n: int, s: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums by type [2, n, s] on a coarse grid, so that ties are common; counts [2, n, s]; labels, some missing."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(0, 3, (2, n, s), generator=generator).float() / 4
    counts = torch.randint(0, 3, (2, n, s), generator=generator, dtype=torch.int32)
    return sums, counts, torch.randint(-1, 3, (n,), generator=generator)


def batch_of(sums: torch.Tensor, counts: torch.Tensor) -> ImageLatents:
    """A batch whose histogram counts each image's total in bin 5."""
    histogram = torch.zeros(sums.shape[2], HISTOGRAM_BINS, dtype=torch.int64)
    histogram[:, 5] = (sums.sum(dim=0) > 0).sum(dim=0)
    return ImageLatents(sums, counts, histogram, sum(TYPE_SIZES))


def gather(seed: int, n: int, s: int, parts: list[list[int]], order: list[int]) -> LatentStatistics:
    sums, counts, labels = images(seed, n, s)
    total = LatentStatistics(s, 4, TYPE_SIZES, 2)
    for index in order:
        part = torch.tensor(parts[index])
        one = LatentStatistics(s, 4, TYPE_SIZES, 2)
        for rows in part.split(3):
            one.update(batch_of(sums[:, rows], counts[:, rows]), rows + 10**9, labels[rows])
        total.merge(LatentStatistics.from_arrays(from_bytes(to_bytes(one.to_arrays()))))
    return total


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 30), cuts=st.sets(st.integers(1, 29)), data=st.data())
def test_any_split_and_order_gives_the_same(seed: int, n: int, cuts: set[int], data: st.DataObject) -> None:
    s = 5
    edges = [0, *sorted(cut for cut in cuts if cut < n), n]
    parts = [list(range(low, high)) for low, high in pairwise(edges)]
    order = data.draw(st.permutations(range(len(parts))))
    found = gather(seed, n, s, parts, list(order)).result(3)
    sums, counts, labels = images(seed, n, s)
    means = sums.sum(dim=0) / 4
    for latent in range(s):
        ranked = sorted((-means[i, latent].item(), i) for i in range(n) if means[i, latent] > 0)[:4]
        wanted = [i for _, i in ranked] + [-1] * (4 - len(ranked))
        assert found.top.positions[latent].tolist() == [i + 10**9 if i >= 0 else -1 for i in wanted]
        assert found.top.values[latent].tolist() == [-v for v, _ in ranked] + [0.0] * (4 - len(ranked))
        assert found.top.labels[latent].tolist() == [labels[i].item() if i >= 0 else -1 for i in wanted]
        for threshold in range(2):
            for label in range(3):
                wanted_count = counts[threshold, labels == label, latent].sum()
                assert found.class_counts[threshold, latent, label] == wanted_count
        for kind, of_kind in enumerate([means, sums[0], sums[1] / 3]):
            active = (of_kind[:, latent] > 0).sum()
            frequency = found.sparsity if kind == 0 else found.sparsity_by_type[kind - 1]
            mean = found.mean_acts if kind == 0 else found.mean_acts_by_type[kind - 1]
            assert frequency[latent] == pytest.approx((active / n).item())
            assert mean[latent] == pytest.approx((of_kind[:, latent].sum() / active.clamp_min(1)).item(), rel=1e-6)
        assert found.histogram[latent].sum() == found.histogram[latent, 5] == (means[:, latent] > 0).sum()


def test_never_active_latent_is_zero_and_empty() -> None:
    statistics = LatentStatistics(3, 2, TYPE_SIZES)
    nothing = batch_of(torch.zeros(2, 4, 3), torch.zeros(1, 4, 3, dtype=torch.int32))
    statistics.update(nothing, torch.arange(4), torch.zeros(4).long())
    result = statistics.result(2)
    assert (result.mean_acts == 0).all()
    assert (result.top.positions == -1).all()
    assert (result.top.labels == -1).all()
    assert (result.top.values == 0).all()
    assert result.class_counts.shape == (1, 3, 2)


def test_sums_do_not_depend_on_the_order() -> None:
    """Terms of which float64 alone loses most of the small ones; math.fsum is exact."""
    rng = np.random.default_rng(0)
    terms = rng.uniform(0, 1, 3000) * 10.0 ** rng.integers(-12, 6, 3000)
    plain = set()
    found = set()
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(terms))
        parts = [CompensatedSum(1) for _ in range(7)]
        for index, term in enumerate(order):
            parts[index % 7].add(terms[term : term + 1])
        for part in parts[1:]:
            parts[0].merge(CompensatedSum.from_stacked(part.stacked()))
        found.add(float(parts[0].high[0]))
        plain.add(float(sum(terms[order])))
    assert found == {math.fsum(terms)}
    assert len(plain) > 1, "the case is too easy"


def test_quality_against_the_definitions() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 3
    close = x + 0.1 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    values = torch.rand(70)
    whole = ReconstructionQuality(6)
    for rows in (slice(0, 11), slice(11, 40)):
        part = ReconstructionQuality(6)
        part.update(x[rows], close[rows], values if rows.start else values[:0], 4)
        whole.merge(ReconstructionQuality.from_arrays(from_bytes(to_bytes(part.to_arrays()))))
    result = whole.result()
    assert result is not None
    error, spread = ((close - x) ** 2).sum(), ((x - x.mean(dim=0)) ** 2).sum()
    assert result.explained_variance == pytest.approx((1 - error / spread).item(), rel=1e-5)
    assert result.mse == pytest.approx(((close - x) ** 2 / x.norm(dim=-1, keepdim=True)).mean().item(), rel=1e-5)
    assert (result.num_images, result.num_tokens) == (8, 40)
    assert result.l0 == pytest.approx(70 / 40)
    assert result.l1 == pytest.approx(values.sum().item() / 40, rel=1e-5)
    assert ReconstructionQuality(6).result() is None


def test_prefixes_keep_accumulators_apart() -> None:
    arrays = {**prefixed("a", {"x": np.ones(2)}), **prefixed("ab", {"x": np.zeros(3)})}
    assert without_prefix("a", arrays)["x"].tolist() == [1.0, 1.0]


def test_quality_of_identical_tokens_and_of_zeros() -> None:
    x = (torch.randn(1, 6, generator=torch.Generator().manual_seed(0)) + 3).expand(50, 6)
    same = ReconstructionQuality(6)
    for rows in (slice(0, 20), slice(20, 50)):
        same.update(x[rows], x[rows] + 0.1, torch.rand(9), 1)
    found = same.result()
    assert found is not None
    assert math.isnan(found.explained_variance), "nothing varies, so there is nothing to explain"
    zeros = ReconstructionQuality(6)
    zeros.update(torch.cat([x, torch.zeros(50, 6)]), torch.cat([x + 0.1, torch.ones(50, 6)]), torch.rand(9), 2)
    half = zeros.result()
    assert half is not None
    assert half.mse == pytest.approx(found.mse / 2), "a token of zeros has no length to divide its error by"
