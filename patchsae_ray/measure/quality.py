"""How well an autoencoder reconstructs, and how sparsely. Each metric's definition stands with its field."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays


@dataclass(frozen=True)
class QualityResult:
    """Over the tokens of the images measured."""

    num_images: int
    num_tokens: int
    explained_variance: float
    """1 - sum |x - x'|^2 / sum |x - mean x|^2, the mean over all tokens measured; NaN without variance."""
    mse: float
    """Mean over tokens and dimensions of (x' - x)^2 / |x|, PatchSAE's normalised error."""
    l0: float
    """Mean number of active latents a token."""
    l1: float
    """Mean over tokens of sum |z|."""


class ReconstructionQuality:
    """Exact sums for `QualityResult`, in float64.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        self.sums = np.zeros(width)
        """[d]: sum of x."""
        self.totals = np.zeros(5)
        """Sums of |x|^2, |x - x'|^2, mean((x' - x)^2 / |x|), active latents, |z|."""
        self.counts = np.zeros(2, dtype=np.int64)
        """Images and tokens."""

    def update(self, x: Tensor, reconstruction: Tensor, latents: Tensor, num_images: int) -> None:
        """Take in tokens x [m, d], their reconstruction [m, d], and the values of their active latents."""
        x, error = x.to(torch.float64), (reconstruction - x).to(torch.float64) ** 2
        self.sums += x.sum(dim=0).cpu().numpy()
        normalised = (error / x.norm(dim=-1, keepdim=True)).mean(dim=-1).sum()
        values = latents.to(torch.float64)
        self.totals += [
            float((x**2).sum()),
            float(error.sum()),
            float(normalised),
            float((values > 0).sum()),
            float(values.sum()),
        ]
        self.counts += [num_images, len(x)]

    def merge(self, other: "ReconstructionQuality") -> None:
        """Take in another's tokens."""
        self.sums += other.sums
        self.totals += other.totals
        self.counts += other.counts

    def result(self) -> QualityResult | None:
        """The metrics, or None where nothing was measured."""
        images, tokens = (int(count) for count in self.counts)
        if tokens == 0:
            return None
        squares, error, normalised, active, l1 = (float(total) for total in self.totals)
        variance = squares - float((self.sums**2).sum()) / tokens
        explained = 1 - error / variance if variance > 0 else float("nan")
        return QualityResult(images, tokens, explained, normalised / tokens, active / tokens, l1 / tokens)

    def to_arrays(self) -> Arrays:
        return {"sums": self.sums, "totals": self.totals, "counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "ReconstructionQuality":
        made = cls(len(arrays["sums"]))
        made.sums, made.totals, made.counts = arrays["sums"], arrays["totals"], arrays["counts"]
        return made
