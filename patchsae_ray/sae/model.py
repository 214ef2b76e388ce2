"""The sparse autoencoder: z = act((x - b_dec) W_enc + b_enc), x' = z W_dec + b_dec.

Shapes: d width of the residual stream, s latents; leading dimensions are free.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Relu:
    """The activation of PatchSAE: a latent is active where its pre-activation is positive."""

    def __call__(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)


Activation = Relu


class SparseAutoencoder(nn.Module):
    """PatchSAE's autoencoder.

    W_dec's rows are unit length at the start of a training step only; a checkpoint's are used as they are.

    Args:
        d_in: d, width of the residual stream.
        d_sae: s, number of latents.
        activation: what follows the encoder's product.
    """

    def __init__(self, d_in: int, d_sae: int, activation: Activation | None = None) -> None:
        super().__init__()
        self.activation = activation or Relu()
        self.W_enc = nn.Parameter(torch.empty(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SparseAutoencoder":
        """A frozen autoencoder around W_enc, b_enc, W_dec and b_dec, which are not copied."""
        with torch.device("meta"):
            sae = cls(*tensors["W_enc"].shape)
        sae.load_state_dict(tensors, assign=True)
        return sae.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual x [..., d] → reconstruction x' [..., d]."""
        return self.decode(self.encode(x))

    @property
    def d_in(self) -> int:
        """d."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """s."""
        return self.W_enc.shape[1]

    def pre_activations(self, x: Tensor, latents: slice = slice(None)) -> Tensor:
        """x [..., d] → [..., s] before the activation, for all latents or a slice of them; the product in W_enc's dtype."""
        centred = (x - self.b_dec).to(self.W_enc.dtype)
        weight, bias = self.W_enc[:, latents], self.b_enc[latents]
        if centred.ndim == 2 and weight.dtype == bias.dtype:
            return torch.addmm(bias, centred, weight)  # one pass over the result instead of two
        return centred @ weight + bias

    def cast_encoder(self, dtype: torch.dtype) -> "SparseAutoencoder":
        """Run the encoder's product, all but the whole cost, in this dtype; biases and decoder stay float32."""
        self.W_enc.data = self.W_enc.data.to(dtype)
        return self

    def encode(self, x: Tensor, latents: slice = slice(None)) -> Tensor:
        """Residual x [..., d] → latents z [..., s], or those of a slice."""
        return self.activation(self.pre_activations(x, latents))

    def decode(self, z: Tensor) -> Tensor:
        """Latents z [..., s] → reconstruction x' [..., d]."""
        return z @ self.W_dec + self.b_dec


@torch.no_grad()
def initialise(sae: SparseAutoencoder, generator: torch.Generator) -> None:
    """PatchSAE's start, b_dec apart: Kaiming uniform with the fan-in of dimension 1, unit decoder rows, zero biases.

    The fan-in of W_enc [d, s] is taken from its second dimension, so it is uniform within ±sqrt(6 / s).
    """
    for weight in (sae.W_enc, sae.W_dec):
        bound = (6.0 / weight.shape[1]) ** 0.5
        weight.uniform_(-bound, bound, generator=generator)
    normalise_decoder(sae)
    sae.b_enc.zero_()
    sae.b_dec.zero_()


@torch.no_grad()
def normalise_decoder(sae: SparseAutoencoder) -> None:
    """Make every row of W_dec unit length, in place."""
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@torch.no_grad()
def geometric_median(points: Tensor, max_steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to `points` [m, d], by Weiszfeld's iteration.

    Weiszfeld (1937), as in the smoothed form of Pillutla et al. (2022), arXiv 1912.13445: distances are kept above 1e-8.
    Stops when the relative change of the objective falls below `tolerance`.
    """
    points = points.to(torch.float64)
    median = points.mean(dim=0)
    distances = (points - median).norm(dim=1)
    objective = distances.sum()
    for _ in range(max_steps):
        weights = 1.0 / distances.clamp_min(1e-8)
        median = (points * weights[:, None]).sum(dim=0) / weights.sum()
        distances = (points - median).norm(dim=1)
        previous, objective = objective, distances.sum()
        if abs(previous - objective) <= tolerance * objective:
            break
    return median.to(torch.float32)
