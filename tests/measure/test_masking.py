"""Right predictions by class and setting, and their intervals: against drawing images again, and by how often they hold."""

import numpy as np
import pytest

from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.masking import MaskingAccuracy, settings_of


def images(seed: int, number: int, classes: int, orders: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, right without the autoencoder, and right under 2 settings of each order, correlated by class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, number)
    without = rng.random(number) < 0.5 + 0.4 * labels / classes
    shares = np.stack([0.3 + 0.5 * without, 0.1 + 0.2 * labels / classes], axis=1)
    return labels, without, rng.random((number, 2, orders)) < shares[:, :, None]


@pytest.mark.parametrize("orders", [1, 3])
def test_any_split_gives_the_table(orders: int) -> None:
    labels, without, right = images(0, 200, 4, orders)
    whole = MaskingAccuracy(2, 5, orders)
    for rows in (slice(150, 200), slice(0, 70), slice(70, 150)):
        part = MaskingAccuracy(2, 5, orders)
        part.update(labels[rows], without[rows], right[rows])
        part.update(labels[:0], without[:0], right[:0])
        whole.merge(MaskingAccuracy.from_arrays(from_bytes(to_bytes(part.to_arrays()))))
    table = whole.table([7])
    assert list(table.index) == settings_of([7]) == ["no_sae", "on_7", "off_7"]
    for label in range(4):
        own = labels == label
        wanted = [without[own].mean(), *right[own].mean(axis=(0, 2))]
        assert np.allclose(table[str(label)], 100 * np.array(wanted))
    assert table["4"].isna().all(), "a class without images has no percentage"
    number = right.sum(axis=2)
    assert whole.squares[:, 2].tolist() == (number[labels == 2] ** 2).sum(axis=0).tolist()
    assert whole.both[:, 2].tolist() == (number * without[:, None])[labels == 2].sum(axis=0).tolist()


def test_intervals_are_those_of_drawing_images_again() -> None:
    labels, without, right = images(1, 3000, 4, 1)
    accuracy = MaskingAccuracy(2, 5)
    accuracy.update(labels, without, right)
    curve = accuracy.curve()
    scores = np.concatenate([without[:, None], right[:, :, 0]], axis=1).astype(np.float64)
    rng = np.random.default_rng(2)
    by_class, by_image = [], []
    for _ in range(2000):
        drawn = [scores[rng.choice(np.flatnonzero(labels == label), (labels == label).sum())] for label in range(4)]
        by_class.append(np.mean([one.mean(axis=0) for one in drawn], axis=0))
        by_image.append(np.concatenate(drawn).mean(axis=0))
    for found, one_by_one in ((curve.mean_over_classes, by_class), (curve.over_images, by_image)):
        low, high = 100 * np.quantile(one_by_one, [0.025, 0.975], axis=0)
        assert np.allclose(found[:, 1], low, atol=0.2)
        assert np.allclose(found[:, 2], high, atol=0.2)
    assert np.allclose(curve.over_images[:, 0], 100 * scores.mean(axis=0))
    assert np.allclose(curve.change[:, 0], curve.mean_over_classes[:, 0] - curve.mean_over_classes[0, 0])
    differences = np.array(by_class)[:, 1:] - np.array(by_class)[:, :1]
    assert np.allclose(curve.change[1:, 1:], 100 * np.quantile(differences, [0.025, 0.975], axis=0).T, atol=0.2)


def coverage(classes: int, n: int, orders: int, spread: float, shares: tuple[float, float], repeats: int = 400) -> float:
    """How often the interval holds the truth, where each order adds its own normal deviate to every class's share."""
    rng = np.random.default_rng(0)
    truth, labels = np.linspace(*shares, classes), np.repeat(np.arange(classes), n)
    hits = 0
    for _ in range(repeats):
        of_order = truth[labels][:, None] + rng.normal(0, spread, orders)
        accuracy = MaskingAccuracy(1, classes, orders)
        accuracy.update(labels, np.zeros(len(labels), bool), (rng.random((len(labels), 1)) < of_order)[:, None])
        _, low, high = accuracy.curve().mean_over_classes[1]
        hits += low <= 100 * truth.mean() <= high
    return hits / repeats


@pytest.mark.parametrize(("orders", "n"), [(5, 20), (5, 200), (20, 50), (2, 50)])
def test_intervals_hold_over_other_orders_too(orders: int, n: int) -> None:
    """Five points of spread between the orders: images drawn again alone would hold 29 to 60 times in 100."""
    assert 0.91 <= coverage(10, n, orders, 0.05, (0.4, 0.8)) <= 0.99


@pytest.mark.parametrize(
    ("classes", "n", "shares"),
    [(10, 2, (0.6, 0.95)), (10, 2, (0.9, 0.99)), (1, 20, (0.9, 0.9)), (100, 2, (0.3, 0.99)), (10, 50, (0.9, 0.99))],
)
def test_intervals_hold_for_few_images_and_near_certainty(classes: int, n: int, shares: tuple[float, float]) -> None:
    assert 0.93 <= coverage(classes, n, 1, 0.0, shares) <= 0.985


def test_orders_that_do_not_differ_cost_little() -> None:
    labels, without, _ = images(4, 2000, 4, 1)
    same = np.repeat((np.random.default_rng(0).random(2000) < 0.6)[:, None, None], 5, axis=2)
    five, one = MaskingAccuracy(1, 4, 5), MaskingAccuracy(1, 4)
    five.update(labels, without, same)
    one.update(labels, without, same[:, :, :1])
    assert np.allclose(five.curve().mean_over_classes, one.curve().mean_over_classes)
    assert np.allclose(five.curve().change, one.curve().change)


def test_a_class_of_one_image() -> None:
    single = MaskingAccuracy(1, 3)
    single.update(np.arange(3), np.array([True, True, False]), np.array([True, False, False])[:, None, None])
    curve = single.curve()
    assert curve.mean_over_classes[:, 0].tolist() == pytest.approx([200 / 3, 100 / 3])
    assert np.isnan(curve.mean_over_classes[:, 1:]).all(), "nothing is known of the spread within a class"
    assert np.isnan(curve.change[1, 1:]).all()
    labels, without, right = images(3, 300, 3, 2)
    many, more = MaskingAccuracy(2, 4, 2), MaskingAccuracy(2, 4, 2)
    for one in (many, more):
        one.update(labels, without, right)
    more.update(np.array([3]), np.array([True]), np.ones((1, 2, 2), bool))
    widths = [np.ptp(one.curve().over_images[:, 1:], axis=1) for one in (many, more)]
    assert np.allclose(widths[0], widths[1], rtol=0.02), "it takes the spread of the others"


def test_certainty_is_never_claimed() -> None:
    accuracy = MaskingAccuracy(1, 2, 2)
    accuracy.update(np.repeat([0, 1], 10), np.ones(20, bool), np.ones((20, 1, 2), bool))
    assert accuracy.curve().mean_over_classes[0].tolist() == pytest.approx([100, 100 * 20 / (20 + 2.1009**2), 100], abs=1e-2)
    certain = 100 * 2.1009**2 / (20 + 2.1009**2)
    assert accuracy.curve().change[1].tolist() == pytest.approx([0, -certain, certain], abs=1e-2)
    assert accuracy.curve().change[0].tolist() == [0, 0, 0], "no_sae is what it is compared with"


def test_a_change_is_measured_on_the_same_images() -> None:
    rng = np.random.default_rng(5)
    labels, without = rng.integers(0, 3, 600), rng.random(600) < 0.6
    accuracy = MaskingAccuracy(1, 3)
    accuracy.update(labels, without, (without ^ (rng.random(600) < 0.02))[:, None, None])  # nearly always the same
    curve = accuracy.curve()
    unpaired = np.hypot(np.ptp(curve.mean_over_classes[0, 1:]), np.ptp(curve.mean_over_classes[1, 1:]))
    assert np.ptp(curve.change[1, 1:]) < unpaired / 3


def test_no_images_have_no_interval() -> None:
    assert np.isnan(MaskingAccuracy(2, 3).curve().mean_over_classes).all()


def test_a_hundred_orders_of_a_thousand_classes_stay_small() -> None:
    labels = np.repeat(np.arange(1000), 2)
    accuracy = MaskingAccuracy(20, 1000, 100)
    right = np.random.default_rng(0).random((2000, 20, 1)) < np.random.default_rng(1).random((1, 1, 100))
    accuracy.update(labels, labels % 2 == 0, right)
    assert sum(values.nbytes for values in vars(accuracy).values()) < 20e6
    assert sum(values.nbytes for values in accuracy.to_arrays().values()) < 3e6
    assert np.isfinite(accuracy.curve().mean_over_classes).all()
