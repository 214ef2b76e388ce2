"""What was right of each image, as bits: any split gives the same, and the paired interval holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.measure.intervals import Spread, change_interval
from patchsae_ray.measure.outcomes import NOT_MEASURED, Outcomes, PairedCounts, tried


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99), unit=st.integers(1, 40), size=st.integers(1, 60), high=st.sampled_from([5, 40_000]), data=st.data()
)
def test_any_split_and_order_gives_the_same(seed: int, unit: int, size: int, high: int, data: st.DataObject) -> None:
    rng, n = np.random.default_rng(seed), 100
    labels, right = rng.integers(0, high, n), rng.random((n, 3)) < 0.5
    measured = rng.random(n) < 0.8
    whole = Outcomes(3)
    for start in data.draw(st.permutations(range(0, n, unit))):
        rows = np.flatnonzero(measured[start : start + unit]) + start
        part = Outcomes(3)
        part.update(rows, labels[rows], right[rows])
        whole.merge(Outcomes.from_arrays(from_bytes(to_bytes(part.to_arrays()))))
    again = Outcomes.from_arrays(from_bytes(to_bytes(whole.to_arrays())))
    blocks = list(again.blocks(n, size))
    assert np.concatenate([found for found, _ in blocks]).tolist() == np.where(measured, labels, NOT_MEASURED).tolist()
    assert np.array_equal(np.concatenate([bits for _, bits in blocks], axis=1), (right & measured[:, None]).T)


def test_a_bit_each_and_two_bytes_of_class() -> None:
    outcomes = Outcomes(4)
    for start in range(0, 51_200, 512):
        outcomes.update(np.arange(start, start + 512), np.full(512, start // 512), np.ones((512, 4), bool))
    assert sum(values.nbytes for values in outcomes.to_arrays().values()) < 51_200 * 2.6


def test_paired_change_by_hand() -> None:
    counts = PairedCounts(2, 3)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    first = np.array([[1, 1, 0, 0, 1, 0, 0, 0], [1] * 8]).astype(bool)
    second = np.array([[1, 0, 1, 1, 1, 1, 0, 0], [1] * 8]).astype(bool)
    counts.update(labels[:3], first[:, :3], second[:, :3])
    counts.update(labels[3:], first[:, 3:], second[:, 3:])
    found = counts.change(0)
    assert (found.images, found.gained, found.lost) == (8, 3, 1)
    assert found.change[0] == pytest.approx((0.25 + 0.25) / 2)
    # Variances of one image's change within the classes: of 0 -1 1 1 and 0 1 0 0, 11/12 and 1/4; t with 6 degrees is 2.4469.
    # With four more images that change, of the 8: a variance of one of 7/16 + 4/8 over one of the mean with 4/8² more.
    effective = (7 / 16 + 4 / 8) / ((11 / 12 / 4 + 1 / 4 / 4) / 4 + 4 / 64)
    spread = Spread(np.array(7 / 16 / effective), np.array(6))
    assert found.change == pytest.approx(change_interval(np.array(3 / 8), np.array(1 / 8), spread, np.array(0.0)))
    certain = 2.4469**2 / (8 + 2.4469**2)
    assert counts.change(1).change == pytest.approx([0, -certain, certain], abs=1e-4), "of 8 images without a change"
    assert counts.change(0, slice(1, 2)).images == 4
    assert np.isnan(counts.change(0, slice(2, 3)).change).all(), "no images, no change"


def test_paired_intervals_hold_and_are_narrower() -> None:
    """Two models that agree on most images: as often right as they should, on a fraction of the width of unpaired ones."""
    rng, classes, n = np.random.default_rng(0), 10, 40
    labels, truth, hits, widths = np.repeat(np.arange(classes), n), 0.03, 0, []
    for _ in range(500):
        first = rng.random(classes * n) < 0.7
        second = np.where(first, rng.random(classes * n) > 0.03, rng.random(classes * n) < 0.17)  # 0.7 * -0.03 + 0.3 * 0.17
        counts = PairedCounts(1, classes)
        counts.update(labels, first[None], second[None])
        _, low, high = counts.change(0).change
        hits += low <= truth <= high
        widths.append(high - low)
    assert 0.925 <= hits / 500 <= 0.975
    assert np.mean(widths) < 0.5 * 2 * 1.96 * np.sqrt(2 * 0.7 * 0.3 / (classes * n))


def test_what_is_tried() -> None:
    assert tried(False) == ("no_sae", "no_sae_in_half")
    assert tried(True)[2:] == ("reconstruction", "reconstruction_in_half")
