"""A seeded permutation of n numbers that is computed number by number, so that 10^9 of them take no memory."""

import numpy as np

_ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of 0 … n - 1.

    A Feistel network of eight rounds (Luby and Rackoff, 1988) permutes the next even power of two; a number that leaves
    0 … n - 1 is permuted again until it is back (cycle walking, Black and Rogaway, 2002), at most four times on average.
    The rounds' function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        n: how many numbers.
        seed: any whole numbers; the same ones give the same permutation on every machine.
    """

    def __init__(self, n: int, *seed: int) -> None:
        self._n = n
        self._half = np.uint64(max(1, -(-max(1, n - 1).bit_length() // 2)))
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The numbers at `places`: int64 in 0 … n - 1, of any shape, to int64 of that shape."""
        found = self._permute(places.astype(np.uint64))
        outside = found >= self._n
        while outside.any():
            found[outside] = self._permute(found[outside])
            outside = found >= self._n
        return found.astype(np.int64)

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        low_bits = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = numbers >> self._half, numbers & low_bits
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & low_bits)
        return (left << self._half) | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, modulo 2^64: every bit of the result depends on every bit of the number."""
    with np.errstate(over="ignore"):
        mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
