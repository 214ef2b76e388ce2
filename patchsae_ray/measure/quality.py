"""How well an autoencoder reconstructs, and how sparsely. Each metric's definition stands with its field."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.sums import CompensatedSum
from patchsae_ray.sae.objective import as_divisor
from patchsae_ray.sae.window import explained_variance


@dataclass(frozen=True)
class QualityResult:
    """Over the tokens of the images measured."""

    num_images: int
    num_tokens: int
    explained_variance: float
    """1 - sum |x - x'|^2 / sum |x - mean x|^2, the mean over all tokens measured; NaN without variance."""
    mse: float
    """Mean over tokens and dimensions of (x' - x)^2 / |x|, PatchSAE's normalised error; 0 for a token of zeros."""
    l0: float
    """Mean number of active latents a token."""
    l1: float
    """Mean over tokens of sum |z|."""


class ReconstructionQuality:
    """Sums for `QualityResult`.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        self.sums = CompensatedSum(width)
        """[d]: sum of x."""
        self.totals = CompensatedSum(5)
        """Sums of |x|^2, |x - x'|^2, mean((x' - x)^2 / |x|), active latents, |z|."""
        self.counts = np.zeros(2, dtype=np.int64)
        """Images and tokens."""

    def update(self, x: Tensor, reconstruction: Tensor, latents: Tensor, num_images: int) -> None:
        """Take in tokens x [m, d], their reconstruction [m, d], and the values of their active latents."""
        x, error = x.to(torch.float64), (reconstruction - x).to(torch.float64) ** 2
        self.sums.add(x.sum(dim=0).cpu().numpy())
        normalised = (error / as_divisor(x.norm(dim=-1, keepdim=True))).mean(dim=-1).sum()
        values = latents.to(torch.float64)
        totals = [(x**2).sum(), error.sum(), normalised, (values > 0).sum(), values.sum()]
        self.totals.add(np.array([float(total) for total in totals]))
        self.counts += [num_images, len(x)]

    def merge(self, other: "ReconstructionQuality") -> None:
        """Take in another's tokens."""
        self.sums.merge(other.sums)
        self.totals.merge(other.totals)
        self.counts += other.counts

    def result(self) -> QualityResult | None:
        """The metrics, or None where nothing was measured."""
        images, tokens = (int(count) for count in self.counts)
        if tokens == 0:
            return None
        squares, error, normalised, active, l1 = (float(total) for total in self.totals.high)
        explained = explained_variance(error, squares, self.sums.high, tokens)
        return QualityResult(images, tokens, explained, normalised / tokens, active / tokens, l1 / tokens)

    def to_arrays(self) -> Arrays:
        return {"sums": self.sums.stacked(), "totals": self.totals.stacked(), "counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "ReconstructionQuality":
        made = cls(arrays["sums"].shape[1])
        made.sums = CompensatedSum.from_stacked(arrays["sums"])
        made.totals = CompensatedSum.from_stacked(arrays["totals"])
        made.counts = arrays["counts"]
        return made
