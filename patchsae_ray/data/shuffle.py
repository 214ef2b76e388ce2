"""The order of training images: a function of the seed alone.

Each epoch permutes the units; within it a window of a few units is permuted image by image. What is in memory is a window.
"""

from collections.abc import Iterable, Iterator

import numpy as np

WINDOW_IMAGES = 2048
"""Images shuffled together; 0.3 GB at 224 by 224."""


def unit_order(num_units: int, epochs: int, seed: int) -> list[int]:
    """Unit indices of `epochs` epochs laid end to end, each epoch in an order of its own."""
    return [int(index) for epoch in range(epochs) for index in np.random.default_rng([seed, epoch]).permutation(num_units)]


def batches(blocks: Iterable[np.ndarray], batch_size: int, num_images: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [batch_size, h, w, 3] from blocks of pixels [m, h, w, 3], until `num_images` are out; the last may be smaller.

    Args:
        blocks: decoded units in `unit_order`.
        batch_size: images a batch.
        num_images: images in all.
        seed: of the order within a window.
    """
    generator = np.random.default_rng([seed, 2**32 - 1])
    given = 0
    rest: np.ndarray | None = None
    for window in _windows(blocks):
        shuffled = window[generator.permutation(len(window))]
        pool = shuffled if rest is None else np.concatenate([rest, shuffled])
        whole = len(pool) // batch_size * batch_size
        for start in range(0, whole, batch_size):
            batch = pool[start : start + min(batch_size, num_images - given)]
            given += len(batch)
            yield batch
            if given == num_images:
                return
        rest = pool[whole:]
    if rest is not None and len(rest):
        yield rest[: num_images - given]


def _windows(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= WINDOW_IMAGES:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)
