"""The order of training images."""

import numpy as np
import pytest

from patchsae_ray.data import shuffle
from patchsae_ray.data.shuffle import batches, unit_order


def blocks(order: list[int], unit: int = 50) -> list[np.ndarray]:
    return [np.arange(index * unit, (index + 1) * unit, dtype=np.int64)[:, None, None, None] for index in order]


def drawn(seed: int, epochs: int = 2, num_images: int = 400, batch_size: int = 16) -> list[np.ndarray]:
    order = unit_order(4, epochs, seed)
    return [batch[:, 0, 0, 0] for batch in batches(blocks(order), batch_size, num_images, seed)]


def test_an_epoch_has_each_image_once() -> None:
    order = unit_order(4, 3, seed=1)
    assert [sorted(order[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert len({tuple(order[start : start + 4]) for start in (0, 4, 8)}) > 1
    seen = np.concatenate(drawn(1))
    assert sorted(seen.tolist()) == sorted([*range(200), *range(200)])


def test_sizes_and_end() -> None:
    assert [len(batch) for batch in drawn(1, num_images=100)] == [16] * 6 + [4]
    assert sum(map(len, drawn(1, num_images=400))) == 400


def test_the_order_is_the_seeds_alone() -> None:
    first, again, other = (np.concatenate(drawn(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_of_a_window_are_mixed_and_of_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({image // 50 for image in drawn(5)[0].tolist()}) > 1
    monkeypatch.setattr(shuffle, "WINDOW_IMAGES", 50)
    assert len({image // 50 for image in drawn(5)[0].tolist()}) == 1
