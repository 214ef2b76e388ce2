"""Ghost gradients, which keep latents alive: Jermyn and Templeton (2024), Anthropic's circuits updates of January 2024.

Shapes: m tokens, d width, s latents, h dead latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.objective import as_divisor
from patchsae_ray.sae.ops import slices


@dataclass(frozen=True)
class GhostGradients:
    """The ghost term of some tokens, and its gradients at the dead latents."""

    term: Tensor
    """Scalar: its part of the mean over all tokens of the step."""
    dead: Tensor
    """[h] int64."""
    W_dec: Tensor
    """[h, d]: of its rows, without the part along each."""
    W_enc: Tensor
    """[h, d]: of its columns."""
    b_enc: Tensor
    """[h]."""
    b_dec: Tensor
    """[d]."""

    def add_to(self, gradient: Tensor, name: str) -> Tensor:
        """Add that of one weight to the gradient of all of it, in place; W_enc's is [s, d]."""
        added = getattr(self, name)
        return gradient.add_(added) if name == "b_dec" else gradient.index_add_(0, self.dead, added)


@torch.no_grad()
def ghost_gradients(sae: SparseAutoencoder, x: Tensor, reconstruction: Tensor, dead: Tensor, num_tokens: int) -> GhostGradients:
    """The ghost term on tokens x [m, d] and its gradients, a slice of the dead latents at a time.

    g = exp(pre) W_dec over dead latents reaches the term's other operand, the residual, through no gradient. So the term is
    differentiated by g once, and each slice of g by its own columns.
    """
    rows = sae.W_enc.t()
    centred = x - sae.b_dec
    parts = [dead[part] for part in slices(len(dead), len(x), x.device.type)]
    ghost = sum((_ghost(centred, rows[part], sae.b_enc[part], sae.W_dec[part]) for part in parts), torch.zeros_like(x))
    with torch.enable_grad():
        ghost.requires_grad_(True)
        term = ghost_term(ghost, x - reconstruction, x.norm(dim=1, keepdim=True)) / (num_tokens * x.shape[1])
        (upstream,) = torch.autograd.grad(term, ghost)
    found = []
    for part in parts:
        leaves = [weight[part].requires_grad_(True) for weight in (rows.detach(), sae.b_enc.detach(), sae.W_dec.detach())]
        with torch.enable_grad():
            found.append(torch.autograd.grad(_ghost(centred, *leaves), leaves, upstream))
    encoder, b_enc, decoder = (torch.cat(each) for each in zip(*found, strict=True))
    directions = sae.W_dec[dead]
    decoder.addcmul_((decoder * directions).sum(dim=1, keepdim=True), directions, value=-1)
    with torch.autocast(x.device.type, enabled=False):
        b_dec = -(b_enc @ rows[dead])
    return GhostGradients(term.detach(), dead, decoder, encoder, b_enc, b_dec)


def _ghost(centred: Tensor, encoder: Tensor, b_enc: Tensor, decoder: Tensor) -> Tensor:
    return (torch.exp(centred @ encoder.t() + b_enc) @ decoder).to(torch.float32)


def ghost_term(ghost: Tensor, residual: Tensor, norm: Tensor) -> Tensor:
    """Sum of the error of ghost reconstructions g [m, d] of residuals r [m, d], scaled to the size of the mse.

    g is brought to half of r's length; error (g - r)^2 / |r|, times mse / (error + 1e-6), mse = r^2 / |x|, |x| [m, 1].
    Gradients flow through g's direction and size before scaling, nothing else. A token whose x or r is 0 adds nothing.
    """
    length = residual.norm(dim=1, keepdim=True)
    scale = length / (1e-6 + 2 * ghost.detach().norm(dim=1, keepdim=True))
    error = (ghost * scale - residual) ** 2 / as_divisor(length)
    return (error * (residual**2 / as_divisor(norm) / (error + 1e-6)).detach()).sum()
