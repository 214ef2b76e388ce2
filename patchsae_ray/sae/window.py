"""What training shows between two lines of its log, from what the steps compute anyway."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.sae.objective import as_divisor

DENSE_TIMES = 10
"""A latent is dense if it is active on more than one in so many tokens."""
LOG_DENSITY_EDGES = np.arange(-14, 1) / 2
"""[15] bounds of the histogram's bins: log10 of a share of tokens, from -7 to 0 in halves."""
_ROUNDING = 1e-12
"""A variance below this share of sum |x|^2 is what the rounding of float32 tokens and of their sums may leave of none."""
_TOTALS = ("tokens", "squares", "error", "legacy", "cosine", "mse", "l1")
NUM_TOTALS = len(_TOTALS)


@dataclass(frozen=True)
class TrainingWindowResult:
    """Over the tokens of the window's steps, each as reconstructed before its step; NaN where there were none."""

    num_tokens: int
    explained_variance: float
    """1 - sum |x - x'|^2 / sum |x - mean x|^2, the mean over all tokens of the window; NaN without variance."""
    explained_variance_legacy: float
    """PatchSAE's: mean over tokens of 1 - |x - x'|^2 / |x|^2, so the variance is taken about zero; 0 for a token of zeros."""
    cosine: float
    """Mean over tokens of the cosine between x and x'."""
    mse: float
    """Mean over tokens and dimensions of (x' - x)^2 / |x|, PatchSAE's, without CLS weight; 0 for a token of zeros."""
    l0: float
    """Mean number of active latents a token."""
    l1: float
    """Mean over tokens of sum |z|."""
    dead_share: float
    """Share of latents that fired on no token for more than `dead_feature_window` batches, at the window's end."""
    dense_share: float
    """Share of latents active on more than 10 % of the window's tokens."""
    log_density: np.ndarray
    """[15] int64, latents: first those that never fired, then by log10 of the share of tokens on which each fired, in
    the bins [-7, -6.5), …, [-0.5, 0] of LOG_DENSITY_EDGES; the lowest also has what is rarer."""

    def as_metrics(self) -> dict[str, float]:
        """The scalars, by name."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self) if field.name != "log_density"}


class TrainingWindow:
    """Sums for `TrainingWindowResult`, float64, on the device of the steps.

    Args:
        width: d.
        num_latents: s.
        device: where the sums are kept.
    """

    def __init__(self, width: int, num_latents: int, device: torch.device | str = "cpu") -> None:
        self._sizes = [NUM_TOTALS, width, num_latents]
        self.values = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        """Totals, the sum of x [d], and tokens on which each latent fired [s], end to end."""

    def update(self, sums: Tensor) -> None:
        """Take in a batch's `token_sums`."""
        self.values += sums

    def merge(self, other: "TrainingWindow") -> None:
        """Take in another's tokens."""
        self.values += other.values

    def clear(self) -> None:
        """Start the next window."""
        self.values.zero_()

    def result(self, dead_share: float) -> TrainingWindowResult:
        """The metrics, with the share of dead latents that the trainer counts."""
        parts = self.values.cpu().split(self._sizes)
        tokens, squares, error, legacy, cosine, mse, l1 = parts[0].tolist()
        sums, counts = parts[1].numpy(), parts[2].numpy()
        per_token = 1 / tokens if tokens else float("nan")
        return TrainingWindowResult(
            num_tokens=int(tokens),
            explained_variance=explained_variance(error, squares, sums, int(tokens)),
            explained_variance_legacy=legacy * per_token,
            cosine=cosine * per_token,
            mse=mse * per_token,
            l0=float(counts.sum()) * per_token,
            l1=l1 * per_token,
            dead_share=dead_share,
            dense_share=float((DENSE_TIMES * counts > tokens).mean()) if tokens else float("nan"),
            log_density=log_density(counts, int(tokens)),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """For `from_tensors`."""
        return dict(zip(("totals", "sums", "counts"), self.values.split(self._sizes), strict=True))

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the sums of `to_tensors`."""
        self.values.copy_(torch.cat([tensors["totals"], tensors["sums"], tensors["counts"]]))


def explained_variance(error: float, squares: float, sums: np.ndarray, num_tokens: int) -> float:
    """1 - sum |x - x'|^2 / sum |x - mean x|^2; NaN without tokens, and where they do not vary beyond rounding.

    sum |x - mean x|^2 = sum |x|^2 - |sum x|^2 / m: for tokens that are all but equal a difference of two nearly equal
    numbers, of which only rounding is left.

    Args:
        error: sum |x - x'|^2.
        squares: sum |x|^2, summed in float64 from float64 squares.
        sums: [d] float64, sum x.
        num_tokens: m.
    """
    variance = squares - float((sums**2).sum()) / num_tokens if num_tokens else 0.0
    return 1 - error / variance if variance > _ROUNDING * squares else float("nan")


def log_density(fired: np.ndarray, num_tokens: int) -> np.ndarray:
    """[15] int64, latents: first those that never fired, then by the share of tokens, in the bins of LOG_DENSITY_EDGES.

    A bin holds its lower edge; the first also what is rarer, the last also 1.

    Args:
        fired: [s], tokens on which each latent fired.
        num_tokens: of how many.
    """
    shares = fired[fired > 0] / num_tokens
    bins = np.searchsorted(10.0 ** LOG_DENSITY_EDGES[1:-1], shares, side="right")
    counts = np.bincount(bins, minlength=len(LOG_DENSITY_EDGES) - 1)
    return np.array([len(fired) - len(shares), *counts], dtype=np.int64)


def token_sums(x: Tensor, reconstruction: Tensor, error: Tensor, norm: Tensor, l1: Tensor, counts: Tensor) -> Tensor:
    """One batch's terms of a window: [7 + d + s] float64; sums over tokens of float32 scalars, but for |x|^2.

    Args:
        x: tokens [m, d].
        reconstruction: x' [m, d].
        error: |x - x'|^2 [m].
        norm: |x| [m].
        l1: sum of |z| over all tokens, float64.
        counts: [s], tokens on which each latent fired.
    """
    cosine = (x * reconstruction).sum(dim=1) / (norm * reconstruction.norm(dim=1)).clamp_min(1e-30)
    squares = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()  # the variance is a small difference of these
    divisor = as_divisor(norm)
    legacy = torch.where(norm == 0, 0.0, 1 - error / divisor**2)
    scalars = [torch.ones_like(norm), squares, error, legacy, cosine, error / (divisor * x.shape[1])]
    totals = torch.stack([scalar.sum(dtype=torch.float64) for scalar in scalars])
    return torch.cat([totals, l1.view(1), x.sum(dim=0, dtype=torch.float64), counts.to(torch.float64)])
