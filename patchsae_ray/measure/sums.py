"""Sums of reals that come out the same for any split and order of the terms."""

import numpy as np


class CompensatedSum:
    """Element-wise sums in double-double arithmetic: a float64 and the float64 rounding error beside it.

    106 bits of mantissa, so that 10^9 terms in any order give the same float64, but for terms chosen against it. The
    error-free sum is Knuth's TwoSum (The Art of Computer Programming, vol. 2, 4.2.2), the pair Dekker's (1971).

    Args:
        shape: of the sums.
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        self.high = np.zeros(shape)
        self.low = np.zeros(shape)

    def add(self, terms: np.ndarray, error: np.ndarray | None = None) -> None:
        """Add float64 terms of the sums' shape, and the low parts beside them if there are any."""
        total = self.high + terms
        shadow = total - self.high
        rounding = (self.high - (total - shadow)) + (terms - shadow)
        low = self.low + rounding if error is None else self.low + error + rounding
        self.high = total + low
        self.low = low - (self.high - total)

    def merge(self, other: "CompensatedSum") -> None:
        """Add another's terms."""
        self.add(other.high, other.low)

    def stacked(self) -> np.ndarray:
        """[2, …] float64: both parts, for `from_stacked`."""
        return np.stack([self.high, self.low])

    @classmethod
    def from_stacked(cls, parts: np.ndarray) -> "CompensatedSum":
        made = cls(parts.shape[1:])
        made.high, made.low = parts[0].copy(), parts[1].copy()
        return made
