"""Latents that stay, fall and rise, by hand."""

import numpy as np
import pytest

from patchsae_ray.measure.comparison import GROUPS, compare_counts, spearman


def test_the_rule_by_hand() -> None:
    #                 0   1   2   3  4  5  6
    base = np.array([90, 80, 70, 60, 5, 1, 0])
    adapted = np.array([95, 2, 66, 10, 50, 77, 0])
    # The third largest are 70 and 66, so high is 66 or more; the fourth are 60 and 50, so low is below 50.
    found = compare_counts(base, adapted, high_k=3, low_k=4, ks=(2, 3, 100))
    assert found.latents.tolist() == [0, 1, 2, 5]
    groups = dict(zip(found.latents.tolist(), (GROUPS[group] for group in found.groups), strict=True))
    assert groups == {0: "high in both", 1: "high to low", 2: "high in both", 5: "low to high"}
    assert found.ranks[:, 1].tolist() == [1, 5]
    assert found.shared == {2: 0.5, 3: pytest.approx(2 / 3)}
    assert found.number("high in both") == 2


def test_between_is_neither_high_nor_low() -> None:
    base, adapted = np.array([90, 80, 40, 30]), np.array([90, 35, 85, 30])
    found = compare_counts(base, adapted, high_k=2, low_k=4)
    assert [GROUPS[group] for group in found.groups] == ["high in both", "between", "between"]


def test_the_same_counts_stay() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, 400)
    found = compare_counts(counts, counts)
    assert set(found.groups.tolist()) == {0}
    assert found.rank_correlation == pytest.approx(1)
    assert found.shared == {10: 1, 50: 1, 100: 1}


def test_the_two_directions_mirror_each_other() -> None:
    rng = np.random.default_rng(1)
    base, adapted = rng.poisson(rng.gamma(0.3, 50, 500)), rng.poisson(rng.gamma(0.3, 50, 500))
    there, back = compare_counts(base, adapted), compare_counts(adapted, base)
    assert there.number("high to low") == back.number("low to high") > 0
    assert there.number("low to high") == back.number("high to low") > 0
    assert there.number("high in both") == back.number("high in both")


def test_latents_that_are_never_active_are_never_high() -> None:
    base, adapted = np.array([3, 0, 0, 0]), np.array([0, 0, 4, 0])
    found = compare_counts(base, adapted)
    assert found.latents.tolist() == [0, 2]
    assert [GROUPS[group] for group in found.groups] == ["high to low", "low to high"]
    assert compare_counts(base, adapted, ks=(3,)).shared == {3: 0.0}, "a latent that is active in neither is not shared"
    nothing = compare_counts(np.zeros(4), np.zeros(4), ks=(3,))
    assert np.isnan(nothing.shared[3])
    assert not len(nothing.latents)
    assert np.isnan(nothing.rank_correlation)


def test_spearman_shares_the_ranks_of_equal_values() -> None:
    # Ranks 1.5 1.5 3 4 and 1 2 3 4: the covariance is 4.5, the spreads 4.5 and 5.
    assert spearman(np.array([1, 1, 2, 3, 0]), np.array([1, 2, 3, 4, 0])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
