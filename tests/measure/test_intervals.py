"""Intervals of changes: against the definition of the score interval, and how often they hold where few images differ."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from patchsae_ray.measure.intervals import Spread, change_interval, mean_interval, spread_of_changes, spread_of_images
from patchsae_ray.measure.masking import MaskingAccuracy


def score(change: float, gained: float, lost: float, images: float) -> float:
    """Squared distance of gained - lost from `change` in standard errors, of the likeliest shares that differ by `change`."""

    def surprise(truly_lost: float) -> float:
        shares = np.array([truly_lost + change, truly_lost, 1 - 2 * truly_lost - change])
        return float(-(np.array([gained, lost, 1 - gained - lost]) @ np.log(shares.clip(min=1e-300))))

    bounds = (max(0.0, -change), (1 - change) / 2)
    truly_lost = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - change) ** 2 * images / (2 * truly_lost + change - change**2)


@pytest.mark.parametrize(("gained", "lost"), [(0.25, 0.125), (0.1, 0.02), (0.0, 0.03), (0.3, 0.3), (0.6, 0.4)])
def test_ends_are_where_the_score_is_the_quantile(gained: float, lost: float) -> None:
    images, variance = 160, (gained + lost - (gained - lost) ** 2) / 160
    spread = Spread(np.array(variance), np.array(1e9))
    value, low, high = change_interval(np.array(gained), np.array(lost), spread, np.array(0.0))
    assert value == pytest.approx(gained - lost)
    assert [score(end, gained, lost, images) for end in (low, high)] == pytest.approx([1.95996**2] * 2, rel=1e-3)


def test_the_other_way_round_is_the_mirror_image() -> None:
    shares, spread, added = np.array([0.0, 0.02, 0.3]), Spread(np.array([1e-4, 2e-4, 4e-3]), np.full(3, 40)), np.full(3, 0.01)
    there, back = change_interval(shares, 0.1 * shares, spread, added), change_interval(0.1 * shares, shares, spread, added)
    assert np.allclose(there, -back[:, [0, 2, 1]])


def test_images_that_all_change_stay_within_bounds() -> None:
    n, each = np.array([10, 10]), np.full(2, 1 / 20)
    all_of_them = n
    spread, added = spread_of_changes(np.full(2, 0.5), n, all_of_them, 0 * n, all_of_them)
    value, low, high = change_interval(all_of_them @ each, 0 * n @ each, spread, added)
    assert 0 < low < value == high == 1


def drawn(n: np.ndarray, gained: np.ndarray | float, lost: np.ndarray | float, repeats: int) -> tuple[float, float]:
    """How often the interval of a mean over classes holds the truth, and its mean width over that of value ± t √variance."""
    rng, weights = np.random.default_rng(0), np.full(len(n), 1 / len(n))
    won = rng.binomial(n, gained, (repeats, len(n)))
    gone = rng.binomial(n - won, lost / (1 - np.asarray(gained)))
    each, truth = weights / n, np.mean(np.broadcast_to(gained, len(n)) - lost)
    _, low, high = change_interval(won @ each, gone @ each, *spread_of_changes(weights, n, won, gone, won + gone)).T
    plain = mean_interval((won - gone) @ each, spread_of_images(weights, n, won - gone, won + gone))
    return float(np.mean((low <= truth) & (truth <= high))), float(np.mean(high - low) / np.ptp(plain[:, 1:], axis=1).mean())


@pytest.mark.parametrize(
    ("classes", "n", "gained", "lost"),
    [
        (10, 10, 0.008, 0), (10, 10, 0, 0.018), (10, 50, 0.004, 0), (10, 50, 0, 0.0045),
        (100, 2, 0.008, 0), (1000, 5, 0, 0.00045), (10, 50, 0.002, 0.002), (1, 20, 0.05, 0),
    ],
)  # fmt: skip
def test_changes_hold_where_few_images_differ(classes: int, n: int, gained: float, lost: float) -> None:
    """value ± t √variance would hold 54 to 90 times in 100, but for the regime that has changes both ways."""
    held, _ = drawn(np.full(classes, n), gained, lost, 1000)
    assert held >= 0.94


def test_changes_hold_where_a_half_of_the_classes_nearly_all_change() -> None:
    assert drawn(np.full(10, 20), np.repeat([0, 0.98], 5), 0, 1000)[0] >= 0.94


def test_changes_hold_where_large_classes_say_little_of_small_ones() -> None:
    assert drawn(np.repeat([2, 50], 50), 0.005, 0, 1000)[0] >= 0.94


@pytest.mark.parametrize(
    ("classes", "n", "gained", "lost", "wider"),
    [(10, 10, 0.1, 0.1, 1.07), (10, 10, 0, 0.18, 1.01), (10, 200, 0.12, 0.08, 1.005), (1000, 50, 0.03, 0.02, 1.002)],
)
def test_many_differences_cost_no_width(classes: int, n: int, gained: float, lost: float, wider: float) -> None:
    held, width = drawn(np.full(classes, n), gained, lost, 1000)
    assert 0.93 <= held <= 0.975
    assert 0.98 <= width <= wider


@pytest.mark.parametrize(("n", "orders", "flipped"), [(10, 5, 0.004), (20, 2, 0.005)])
def test_changes_hold_for_few_differences_of_several_orders(n: int, orders: int, flipped: float) -> None:
    """Each order turns each right image wrong with this chance; value ± t √variance would hold about 80 times in 100."""
    rng, labels, truth = np.random.default_rng(0), np.repeat(np.arange(10), n), -90 * flipped
    hits, widths = 0, []
    for _ in range(200):
        without = rng.random(len(labels)) < 0.9
        accuracy = MaskingAccuracy(1, 10, orders)
        accuracy.update(labels, without, (without[:, None] & (rng.random((len(labels), orders)) >= flipped))[:, None])
        _, low, high = accuracy.curve().change[1]
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits / 200 >= 0.94
    assert np.mean(widths) < 6, "points"
