"""The training objective: reconstruction and sparsity; ghost gradients are in `ghost`.

Shapes: m tokens, d width, s latents. The formulas are PatchSAE's (arXiv 2412.05276, released code). Means are over all
tokens of the step, of which a worker or a part may hold a few: a local sum is divided by `num_tokens`, and sums add up.

PatchSAE divides a token's error by its length |x|, which a token of zeros does not have. Such a token weighs nothing in the
reconstruction term and in the ghost term; it counts among the tokens that the means are over, and in the sparsity term.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchsae_ray.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Objective:
    """What is weighed, and how."""

    l1_coefficient: float = 8e-5
    """Weight of the mean over tokens of sum |z|."""
    mse_cls_coefficient: float = 1.0
    """Weight of the CLS token's reconstruction error."""
    use_ghost_grads: bool = True
    """Give latents that have not fired for a while a gradient through the residual."""

    def error_weights(self, norm: Tensor, cls: Tensor | None) -> Tensor:
        """w / |x| [m] from |x| [m], w the CLS coefficient where `cls` [m] is true and 1 elsewhere; 0 where |x| is 0."""
        weights = 1 / as_divisor(norm)
        return weights if cls is None else torch.where(cls, self.mse_cls_coefficient * weights, weights)


def as_divisor(length: Tensor) -> Tensor:
    """The length, and infinity where it is 0: an error divided by it is then 0, so that a token of zeros weighs nothing."""
    return torch.where(length == 0, torch.inf, length)


@dataclass(frozen=True)
class LossTerms:
    """Some tokens' terms, and what they were made of; all carry a gradient."""

    mse: Tensor
    """Mean over tokens and d of w (x' - x)^2 / |x|, |x| the token's L2 norm, w the CLS coefficient or 1; 0 where |x| is 0."""
    l1: Tensor
    """l1_coefficient times the mean over tokens of sum |z|."""
    latents: Tensor
    """z [m, s]."""
    reconstruction: Tensor
    """x' [m, d]."""


def loss_terms(
    sae: SparseAutoencoder, x: Tensor, objective: Objective, cls: Tensor | None = None, num_tokens: int | None = None
) -> LossTerms:
    """The objective without its ghost term, densely: the plain definition.

    Args:
        sae: the autoencoder.
        x: residuals [m, d].
        objective: the weights.
        cls: [m] bool, the CLS tokens, whose error `mse_cls_coefficient` weighs.
        num_tokens: that the means are over; m where it is left out.
    """
    total = num_tokens or len(x)
    z = sae.encode(x)
    reconstruction = sae.decode(z)
    weights = objective.error_weights(x.norm(dim=-1), cls)
    mse = ((reconstruction - x) ** 2 * weights[:, None]).sum() / (total * x.shape[1])
    return LossTerms(mse, objective.l1_coefficient * z.abs().sum() / total, z, reconstruction)
