"""Right predictions by class and setting, and their intervals, against drawing images again one by one."""

import numpy as np
import pytest

from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.masking import MaskingAccuracy, settings_of


def images(seed: int, number: int, classes: int, orders: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, right without the autoencoder, and in how many orders right under 2 settings, correlated by class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, number)
    without = rng.random(number) < 0.5 + 0.4 * labels / classes
    right = rng.binomial(orders, np.stack([0.3 + 0.5 * without, 0.1 + 0.2 * labels / classes], axis=1))
    return labels, without, right


@pytest.mark.parametrize("orders", [1, 3])
def test_any_split_gives_the_table(orders: int) -> None:
    labels, without, right = images(0, 200, 4, orders)
    whole = MaskingAccuracy(2, 5, orders)
    for rows in (slice(150, 200), slice(0, 70), slice(70, 150)):
        part = MaskingAccuracy(2, 5, orders)
        part.update(labels[rows], without[rows], right[rows])
        whole.merge(MaskingAccuracy.from_arrays(from_bytes(to_bytes(part.to_arrays()))))
    table = whole.table([7])
    assert list(table.index) == settings_of([7]) == ["no_sae", "on_7", "off_7"]
    for label in range(4):
        own = labels == label
        wanted = [without[own].mean(), *(right[own].mean(axis=0) / orders)]
        assert np.allclose(table[str(label)], 100 * np.array(wanted))
    assert table["4"].isna().all(), "a class without images has no percentage"


@pytest.mark.parametrize("orders", [1, 3])
def test_intervals_are_those_of_drawing_images_again(orders: int) -> None:
    labels, without, right = images(1, 300, 4, orders)
    accuracy = MaskingAccuracy(2, 5, orders)
    accuracy.update(labels, without, right)
    curve = accuracy.curve(seed=0, resamples=4000)
    scores = np.concatenate([without[:, None], right / orders], axis=1)
    rng = np.random.default_rng(2)
    by_class, by_image = [], []
    for _ in range(2000):
        drawn = [scores[rng.choice(np.flatnonzero(labels == label), (labels == label).sum())] for label in range(4)]
        by_class.append(np.mean([one.mean(axis=0) for one in drawn], axis=0))
        by_image.append(np.concatenate(drawn).mean(axis=0))
    for found, one_by_one in ((curve.mean_over_classes, by_class), (curve.over_images, by_image)):
        low, high = 100 * np.quantile(one_by_one, [0.025, 0.975], axis=0)
        assert np.allclose(found[:, 1], low, atol=0.6)
        assert np.allclose(found[:, 2], high, atol=0.6)
    assert np.allclose(curve.over_images[:, 0], 100 * scores.mean(axis=0))
    assert np.allclose(curve.change[:, 0], curve.mean_over_classes[:, 0] - curve.mean_over_classes[0, 0])
    differences = np.array(by_class)[:, 1:] - np.array(by_class)[:, :1]
    assert np.allclose(curve.change[1:, 1:], 100 * np.quantile(differences, [0.025, 0.975], axis=0).T, atol=0.9)


def test_a_change_is_measured_on_the_same_images() -> None:
    rng = np.random.default_rng(5)
    labels, without = rng.integers(0, 3, 600), rng.random(600) < 0.6
    accuracy = MaskingAccuracy(1, 3)
    accuracy.update(labels, without, (without ^ (rng.random(600) < 0.02)).astype(np.int64)[:, None])  # nearly always the same
    curve = accuracy.curve(0)
    unpaired = np.hypot(np.ptp(curve.mean_over_classes[0, 1:]), np.ptp(curve.mean_over_classes[1, 1:]))
    assert np.ptp(curve.change[1, 1:]) < unpaired / 3


def test_the_same_seed_gives_the_same_intervals_and_no_images_none() -> None:
    labels, without, right = images(3, 50, 3, 1)
    accuracy = MaskingAccuracy(2, 3)
    accuracy.update(labels, without, right)
    assert np.array_equal(accuracy.curve(1).change, accuracy.curve(1).change)
    assert np.isnan(MaskingAccuracy(2, 3).curve(0).mean_over_classes).all()
