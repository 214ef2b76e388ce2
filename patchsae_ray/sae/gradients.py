"""Gradients of the objective, two ways: densely by autograd, the plain definition, and by way of the few active latents.

Shapes: m tokens, d width, s latents, a active pairs of token and latent, h dead latents. Called without autograd.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from patchsae_ray.sae.ghost import ghost_gradients
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.objective import Objective, loss_terms
from patchsae_ray.sae.ops import slices, weighed_sums
from patchsae_ray.sae.window import NUM_TOTALS, token_sums

GRADIENTS = ("W_dec", "W_enc", "b_enc", "b_dec")
"""The order in which a pass gives them."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@dataclass(frozen=True)
class Batch:
    """Tokens of one step, all or a part of them."""

    x: Tensor
    """[m, d] float32."""
    cls: Tensor | None
    """[m] bool, or none is CLS."""
    num_tokens: int
    """Of the whole step, over parts and workers."""
    dead: Tensor | None
    """[h] int64: latents under ghost gradients."""


@dataclass(frozen=True)
class Pass:
    """What a batch showed, and its gradients."""

    sums: Tensor
    """[2 + 7 + d + s] float64: the mse and ghost terms, as parts of the means over the step, then `token_sums`."""
    gradients: Iterator[Tensor]
    """In the order of GRADIENTS, each computed when asked for. W_enc's is [s, d], transposed. W_dec's is without its part
    along each row, so that a step turns rows and does not stretch them."""


def empty_pass(sae: SparseAutoencoder) -> Pass:
    """That of no tokens."""
    sums = torch.zeros(2 + NUM_TOTALS + sae.d_in + sae.d_sae, dtype=torch.float64, device=sae.W_enc.device)
    return Pass(sums, (torch.zeros_like(weight) for weight in (sae.W_dec, sae.W_dec, sae.b_enc, sae.b_dec)))


def dense_pass(sae: SparseAutoencoder, batch: Batch, objective: Objective) -> Pass:
    """By autograd of `loss_terms`."""
    with torch.enable_grad():
        terms = loss_terms(sae, batch.x, objective, batch.cls, batch.num_tokens)
    reconstruction, z = terms.reconstruction.detach().to(torch.float32), terms.latents.detach()
    error, norm = (reconstruction - batch.x).square().sum(dim=1), batch.x.norm(dim=1)
    sums = token_sums(batch.x, reconstruction, error, norm, z.sum(dtype=torch.float64), (z > 0).sum(dim=0))

    def gradients() -> Iterator[Tensor]:
        parameters = (sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec)
        decoder, encoder, b_enc, b_dec = torch.autograd.grad((terms.mse, terms.l1), parameters)
        along = (decoder * sae.W_dec).sum(dim=1, keepdim=True)
        yield from (decoder.addcmul_(along, sae.W_dec, value=-1), encoder.t().contiguous(), b_enc, b_dec)

    return _with_ghost(sae, batch, reconstruction, terms.mse.detach(), sums, gradients())


def sparse_pass(sae: SparseAutoencoder, batch: Batch, objective: Objective) -> Pass:
    """By closed forms over the active latents; the same gradients to rounding.

    With e = x' - x, M tokens in the step, w the CLS weight: g = dL/dx' = 2 w e / (|x| M d). At an active pair of latent l,
    along = g . W_dec[l], and dL/dpre = along + l1 / M. dL/dW_dec[l] = sum z g, whose part along the row is sum z along;
    dL/dW_enc[:, l] = sum dpre (x - b_dec); dL/db_dec = sum g - W_enc dL/db_enc. All but the encoding is in float32.
    """
    x, centred = batch.x, batch.x - sae.b_dec
    active = active_by_latent(sae, centred)
    reconstruction = decode(sae, active, len(x))
    residual, norm = reconstruction - x, x.norm(dim=1)
    error, weights = residual.square().sum(dim=1), objective.error_weights(norm, batch.cls)
    sums = token_sums(x, reconstruction, error, norm, active.value.sum(dtype=torch.float64), active.counts)
    scale = 1 / (batch.num_tokens * x.shape[1])

    def gradients() -> Iterator[Tensor]:
        g = residual * (2 * scale * weights)[:, None]
        shape = (sae.d_sae, len(x))
        pattern = torch.sparse_csr_tensor(active.starts, active.token, active.value, shape, check_invariants=False)
        along = torch.sparse.sampled_addmm(pattern, sae.W_dec, g.t(), beta=0.0).values()
        decoder = weighed_sums(g, active.token, active.starts[:-1], active.value)
        yield decoder.addcmul_(active.sums(active.value * along)[:, None], sae.W_dec, value=-1)
        d_pre = along.add_(objective.l1_coefficient / batch.num_tokens)
        yield weighed_sums(centred, active.token, active.starts[:-1], d_pre)
        b_enc = active.sums(d_pre)
        with torch.autocast(x.device.type, enabled=False):
            yield from (b_enc, g.sum(dim=0) - sae.W_enc @ b_enc)

    return _with_ghost(sae, batch, reconstruction, (error * weights).sum() * scale, sums, gradients())


def _with_ghost(
    sae: SparseAutoencoder, batch: Batch, reconstruction: Tensor, mse: Tensor, sums: Tensor, gradients: Iterator[Tensor]
) -> Pass:
    term = torch.zeros_like(mse)
    if batch.dead is not None:
        ghost = ghost_gradients(sae, batch.x, reconstruction, batch.dead, batch.num_tokens)
        term, gradients = ghost.term, map(ghost.add_to, gradients, GRADIENTS)
    return Pass(torch.cat([torch.stack([mse, term]).to(torch.float64), sums]), gradients)


@dataclass(frozen=True)
class Active:
    """The active latents of m tokens in coordinate form, a pairs ordered by latent, then token."""

    latent: Tensor
    """[a] int64."""
    token: Tensor
    """[a] int64."""
    value: Tensor
    """[a] float32."""
    starts: Tensor
    """[s + 1] int64: where each latent's pairs start."""

    @property
    def counts(self) -> Tensor:
        """[s] int64: tokens on which each latent fired."""
        return self.starts.diff()

    def sums(self, values: Tensor) -> Tensor:
        """[s]: of values [a], each latent's."""
        return torch.segment_reduce(values, "sum", lengths=self.counts, initial=0)


def active_by_latent(sae: SparseAutoencoder, centred: Tensor) -> Active:
    """Encode tokens x - b_dec [m, d] and keep what is active, a slice of latents at a time."""
    m, rows = len(centred), sae.W_enc.t()
    found: list[tuple[Tensor, Tensor]] = []
    for part in slices(sae.d_sae, m, centred.device.type):
        z = product(rows[part], centred).to(torch.float32).add_(sae.b_enc[part, None]).relu_().flatten()
        place = z.nonzero().flatten()  # NaN is found too, and makes the loss NaN
        found.append((place + part.start * m, z[place]))
    place, value = (torch.cat(column) for column in zip(*found, strict=True))
    latent = place.div(m, rounding_mode="floor")
    edges = torch.arange(sae.d_sae + 1, device=place.device) * m
    return Active(latent, place - latent * m, value, torch.searchsorted(place, edges))


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """rows [a, d] times columns [b, d] transposed: [a, b].

    On a CPU as a convolution of one-pixel filters, which goes to oneDNN: its float32 kernels use AVX-512 on any maker's
    processor, where MKL's matrix product keeps to AVX2 on AMD's (426 against 182 GFLOP/s on two cores of an EPYC 9005).
    """
    if rows.device.type != "cpu":
        return rows @ columns.t()
    pixels = rows.reshape(1, len(rows), 1, -1).permute(0, 3, 1, 2)
    return conv2d(pixels, columns[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(rows), len(columns))


def decode(sae: SparseAutoencoder, active: Active, num_tokens: int) -> Tensor:
    """z W_dec + b_dec from the active latents alone: [m, d] float32."""
    order = torch.argsort(active.token, stable=True)
    starts = torch.searchsorted(active.token[order], torch.arange(num_tokens, device=order.device))
    return weighed_sums(sae.W_dec.detach(), active.latent[order], starts, active.value[order]) + sae.b_dec
