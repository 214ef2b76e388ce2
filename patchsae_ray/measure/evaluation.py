"""How good an autoencoder is on held-out images: sums that merge in any order, and the metrics made of them.

README.md beside this file defines every metric. Shapes: n images, t tokens measured of each, d width, s latents, k types of
tokens (cls, patch, prompt).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays, prefixed, without_prefix
from patchsae_ray.measure.recovered import ZeroShotMetrics
from patchsae_ray.measure.sums import CompensatedSum
from patchsae_ray.sae.objective import as_divisor
from patchsae_ray.sae.ops import ActiveLatents
from patchsae_ray.sae.window import DENSE_TIMES, explained_variance, log_density

PARTIALS = 2
"""Version of `EvaluationTotals`' arrays: partial results of another version are not read."""


@dataclass(frozen=True)
class TokenResult:
    """Over the measured tokens of one type, or of all types; x' is the reconstruction of x, | | the L2 norm."""

    num_tokens: int
    mse: float
    """Mean over tokens and dimensions of (x' - x)^2 / |x|, PatchSAE's normalised error; 0 for a token of zeros."""
    explained_variance: float
    """1 - sum |x - x'|^2 / sum |x - mean x|^2, the mean over these very tokens; NaN without variance."""
    explained_variance_legacy: float
    """Mean over tokens of 1 - |x - x'|^2 / |x|^2: PatchSAE's, about zero instead of the mean; 0 for a token of zeros."""
    cosine: float
    """Mean over tokens of x·x' / (|x| |x'|), 0 where either is 0."""
    l0: float
    """Mean number of active latents a token."""
    l1: float
    """Mean over tokens of sum |z|."""
    dead_share: float
    """Share of the latents that are active on none of the tokens."""
    dense_share: float
    """Share of the latents that are active on more than a tenth of the tokens."""
    density: tuple[int, ...]
    """Latents by the share of tokens on which they are active, in the bins of LOG_DENSITY_EDGES; without the never active."""
    never: int
    """Latents that are active on none of the tokens."""


class TokenMetrics:
    """Sums for `TokenResult`, by type of token.

    Args:
        num_types: k.
        width: d.
        num_latents: s.
    """

    def __init__(self, num_types: int, width: int, num_latents: int) -> None:
        self.sums = CompensatedSum((num_types, width))
        """[k, d]: sum of x."""
        self.totals = CompensatedSum((num_types, 6))
        """[k, 6]: |x|^2, |x - x'|^2, mean((x' - x)^2 / |x|), |x - x'|^2 / |x|^2 (1 for a token of zeros), cosine, sum |z|."""
        self.fired = np.zeros((num_types, num_latents), dtype=np.int64)
        """[k, s]: tokens on which each latent is active."""
        self.tokens = np.zeros(num_types, dtype=np.int64)
        """[k]."""
        self.images = np.zeros(1, dtype=np.int64)

    def update(self, x: Tensor, reconstruction: Tensor, active: ActiveLatents, types: Tensor) -> None:
        """Take in images: tokens x [n, t, d], their reconstruction, their active latents, and the tokens' types [t] int64."""
        num_types, num_latents = self.fired.shape
        wide, other = x.to(torch.float64), reconstruction.to(torch.float64)
        squares, error = (wide**2).sum(dim=-1), ((other - wide) ** 2).sum(dim=-1)
        norm = squares.sqrt()
        cosine = (wide * other).sum(dim=-1) / (norm * other.norm(dim=-1)).clamp_min(torch.finfo(torch.float64).tiny)
        divisor = as_divisor(norm)
        relative = torch.where(norm == 0, 1.0, error / divisor**2)
        terms = torch.stack([squares, error, error / divisor / x.shape[-1], relative, cosine], dim=-1)  # [n, t, 5]
        kind = types[active.token.remainder(len(types))]
        values = active.value.abs().to(torch.float64)  # summed a type at a time: a GPU's weighed bincount adds in any order
        l1 = torch.stack([values.masked_fill(kind != one, 0.0).sum() for one in range(num_types)])
        by_type = torch.stack([terms[:, types == one].sum(dim=(0, 1)) for one in range(num_types)])
        self.sums.add(sums_by_type(wide, types, num_types))
        self.totals.add(torch.cat([by_type, l1[:, None]], dim=1).cpu().numpy())
        fired = torch.bincount(kind * num_latents + active.latent, minlength=num_types * num_latents)
        self.fired += fired.view(num_types, num_latents).cpu().numpy()
        self.tokens += len(x) * torch.bincount(types, minlength=num_types).cpu().numpy()
        self.images += len(x)

    def merge(self, other: "TokenMetrics") -> None:
        """Take in another's tokens."""
        self.sums.merge(other.sums)
        self.totals.merge(other.totals)
        self.fired += other.fired
        self.tokens += other.tokens
        self.images += other.images

    def result(self, types: Sequence[str]) -> dict[str, TokenResult]:
        """Metrics over `all` tokens and over those of each type, by their names; empty where nothing was measured."""
        if not self.tokens.sum():
            return {}
        groups = {"all": slice(None), **{name: slice(index, index + 1) for index, name in enumerate(types)}}
        return {name: self._of(group) for name, group in groups.items()}

    def _of(self, types: slice) -> TokenResult:
        tokens, fired = int(self.tokens[types].sum()), self.fired[types].sum(axis=0)
        squares, error, normalised, relative, cosine, l1 = self.totals.high[types].sum(axis=0).tolist()
        never, *density = log_density(fired, tokens).tolist()
        return TokenResult(
            num_tokens=tokens,
            mse=normalised / tokens,
            explained_variance=explained_variance(error, squares, self.sums.high[types].sum(axis=0), tokens),
            explained_variance_legacy=1 - relative / tokens,
            cosine=cosine / tokens,
            l0=int(fired.sum()) / tokens,
            l1=l1 / tokens,
            dead_share=never / len(fired),
            dense_share=int((DENSE_TIMES * fired > tokens).sum()) / len(fired),
            density=tuple(density),
            never=never,
        )

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        sums = {"sums": self.sums.stacked(), "totals": self.totals.stacked()}
        return {**sums, "fired": self.fired, "tokens": self.tokens, "images": self.images}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "TokenMetrics":
        """The reverse of `to_arrays`."""
        made = cls(0, 0, 0)
        made.sums, made.totals = (CompensatedSum.from_stacked(arrays[name]) for name in ("sums", "totals"))
        made.fired, made.tokens, made.images = arrays["fired"], arrays["tokens"], arrays["images"]
        return made


def sums_by_type(x: Tensor, types: Tensor, num_types: int) -> np.ndarray:
    """[k, d] float64: sum of tokens x [n, t, d] float64 of each type; types [t] int64."""
    return torch.stack([x[:, types == kind].sum(dim=(0, 1)) for kind in range(num_types)]).cpu().numpy()


class EvaluationTotals:
    """What came of any number of units, mergeable in any order."""

    def __init__(self) -> None:
        self.tokens: TokenMetrics | None = None
        self.zero_shot: ZeroShotMetrics | None = None
        """None where nothing was to be classified."""

    def add(self, arrays: Arrays) -> None:
        """Take in what a unit, or another's `to_arrays`, gave."""
        tokens, zero_shot = without_prefix("tokens", arrays), without_prefix("zero_shot", arrays)
        if tokens and self.tokens is None:
            self.tokens = TokenMetrics.from_arrays(tokens)
        elif tokens and self.tokens is not None:
            self.tokens.merge(TokenMetrics.from_arrays(tokens))
        if zero_shot and self.zero_shot is None:
            self.zero_shot = ZeroShotMetrics.from_arrays(zero_shot)
        elif zero_shot and self.zero_shot is not None:
            self.zero_shot.merge(ZeroShotMetrics.from_arrays(zero_shot))

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        tokens = prefixed("tokens", self.tokens.to_arrays()) if self.tokens else {}
        return {**tokens, **(prefixed("zero_shot", self.zero_shot.to_arrays()) if self.zero_shot else {})}


def objective_terms(found: Mapping[str, TokenResult], l1_coefficient: float, mse_cls_coefficient: float) -> dict[str, float]:
    """The training objective on the measured tokens, without ghost gradients: mse_loss, l1_loss and their sum, loss.

    mse_loss is the mse with the CLS token's term multiplied by `mse_cls_coefficient`, l1_loss the L1 times `l1_coefficient`.

    Args:
        found: of `TokenMetrics.result`, not empty.
        l1_coefficient: the checkpoint's.
        mse_cls_coefficient: the checkpoint's.
    """
    every, cls = found["all"], found.get("cls")
    more = (mse_cls_coefficient - 1) * cls.mse * cls.num_tokens / every.num_tokens if cls and mse_cls_coefficient != 1 else 0.0
    mse, l1 = every.mse + more, l1_coefficient * every.l1
    return {"mse_loss": mse, "l1_loss": l1, "loss": mse + l1}
