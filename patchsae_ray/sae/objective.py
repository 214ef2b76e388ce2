"""The training objective: reconstruction, sparsity, and ghost gradients that keep latents alive.

Shapes: n images, t tokens, d width, s latents. The formulas are PatchSAE's (arXiv 2412.05276, released code);
ghost gradients are those of Jermyn and Templeton (2024), Anthropic's circuits updates of January 2024.
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


@dataclass(frozen=True)
class LossTerms:
    """One batch's terms, scalars that carry a gradient, and what the batch showed."""

    mse: Tensor
    """Mean over n, t, d of (x' - x)^2 / |x|, |x| the token's L2 norm."""
    l1: Tensor
    """l1_coefficient times the mean over n, t of sum |z|."""
    ghost: Tensor
    """The ghost term; 0 where no latent is dead or it is off."""
    l0: Tensor
    """Mean number of active latents a token; no gradient."""
    fired: Tensor
    """[s] bool: active on at least one token."""

    @property
    def total(self) -> Tensor:
        return self.mse + self.l1 + self.ghost


def loss_terms(sae: SparseAutoencoder, x: Tensor, objective: Objective, dead: Tensor, has_cls: bool = True) -> LossTerms:
    """The objective on one batch.

    Args:
        sae: the autoencoder.
        x: residual [n, t, d].
        objective: the weights.
        dead: [s] bool, latents that get ghost gradients.
        has_cls: whether token 0 is CLS, whose error `mse_cls_coefficient` weighs.
    """
    pre = sae.pre_activations(x)
    z = sae.activation(pre)
    reconstruction = sae.decode(z)
    mse = normalised_mse(reconstruction, x)
    weighed = mse
    if has_cls and objective.mse_cls_coefficient != 1.0:
        weights = torch.ones(x.shape[1], 1, device=x.device)
        weights[0] = objective.mse_cls_coefficient
        weighed = mse * weights
    active = z.detach() > 0
    ghost = x.new_zeros(())
    if objective.use_ghost_grads and bool(dead.any()):
        ghost = ghost_term(sae, pre, x, reconstruction, mse, dead)
    return LossTerms(
        mse=weighed.mean(),
        l1=objective.l1_coefficient * z.abs().sum(dim=-1).mean(),
        ghost=ghost,
        l0=active.sum(dim=-1).to(torch.float32).mean(),
        fired=active.flatten(0, -2).any(dim=0),
    )


def normalised_mse(reconstruction: Tensor, x: Tensor) -> Tensor:
    """(x' - x)^2 / |x| elementwise [n, t, d], |x| the L2 norm of each token."""
    return (reconstruction - x) ** 2 / x.norm(dim=-1, keepdim=True)


def ghost_term(sae: SparseAutoencoder, pre: Tensor, x: Tensor, reconstruction: Tensor, mse: Tensor, dead: Tensor) -> Tensor:
    """Mean of the ghost reconstruction's error of the residual, scaled to the size of the mse.

    r = x - x'; g = exp(pre) W_dec over dead latents, scaled to half of r's length; error (g - r)^2 / |r|, times
    mse / (error + 1e-6). Gradients flow through g's direction and size before scaling, nothing else.
    """
    residual = x - reconstruction
    ghost = torch.exp(pre[..., dead]) @ sae.W_dec[dead]
    with torch.no_grad():
        scale = residual.norm(dim=-1, keepdim=True) / (1e-6 + 2 * ghost.norm(dim=-1, keepdim=True))
    target = residual.detach()
    error = (ghost * scale - target) ** 2 / target.norm(dim=-1, keepdim=True)
    return (error * (mse / (error + 1e-6)).detach()).mean()


@torch.no_grad()
def remove_parallel_gradient(sae: SparseAutoencoder) -> None:
    """Take from the gradient of each W_dec row its part along that row, so that a step turns rows and does not stretch them."""
    gradient = sae.W_dec.grad
    if gradient is not None:
        along = (gradient * sae.W_dec).sum(dim=1, keepdim=True)
        gradient.sub_(along * sae.W_dec)
