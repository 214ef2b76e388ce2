"""The hot operations on latents, in slices: nothing of shape [n, t, s] is ever whole.

Each fast form stands beside the plain definition that a test holds it to.
Shapes: n images, t tokens, d width, s latents, k settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from patchsae_ray.sae.model import SparseAutoencoder

SLICE_BYTES = 64 * 2**20
"""Upper bound of one slice of latents [n, t, slice] in float32."""


@dataclass(frozen=True)
class ImageLatents:
    """What an image's tokens say of each latent."""

    means: Tensor
    """[n, s] float32: mean of z over the tokens."""
    counts: Tensor
    """[n, s] int32: tokens with z above the threshold."""


@dataclass(frozen=True)
class ActiveLatents:
    """The non-zero latents of tokens laid end to end, in coordinate form (m of them, latents ascending by slice)."""

    token: Tensor
    """[m] int64: position in the flattened tokens [n * t]."""
    latent: Tensor
    """[m] int64."""
    value: Tensor
    """[m] float32."""
    num_tokens: int
    """n * t."""


def slices(num_latents: int, num_tokens: int) -> Iterator[slice]:
    """Slices of the latents whose activations on `num_tokens` tokens stay within SLICE_BYTES."""
    size = max(1, min(num_latents, SLICE_BYTES // (4 * max(1, num_tokens))))
    for start in range(0, num_latents, size):
        yield slice(start, min(start + size, num_latents))


def reduce_latents(sae: SparseAutoencoder, x: Tensor, threshold: float) -> ImageLatents:
    """Encode residuals x [n, t, d] and reduce over tokens, a slice of latents at a time."""
    n, t, _ = x.shape
    means = torch.empty(n, sae.d_sae, device=x.device)
    counts = torch.empty(n, sae.d_sae, dtype=torch.int32, device=x.device)
    for part in slices(sae.d_sae, n * t):
        z = sae.encode(x, part).to(torch.float32)
        means[:, part] = z.mean(dim=1)
        counts[:, part] = (z > threshold).sum(dim=1, dtype=torch.int32)
    return ImageLatents(means, counts)


def reduce_latents_plain(sae: SparseAutoencoder, x: Tensor, threshold: float) -> ImageLatents:
    """The definition that `reduce_latents` is held to."""
    z = sae.encode(x).to(torch.float32)
    return ImageLatents(z.mean(dim=1), (z > threshold).sum(dim=1, dtype=torch.int32))


def active_latents(sae: SparseAutoencoder, x: Tensor) -> ActiveLatents:
    """Encode residuals x [n, t, d] and keep the non-zero latents of every token."""
    tokens = x.flatten(0, 1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in slices(sae.d_sae, len(tokens)):
        z = sae.encode(tokens, part).to(torch.float32)
        token, latent = z.nonzero(as_tuple=True)
        found.append((token, latent + part.start, z[token, latent]))
    token, latent, value = (torch.cat(column) for column in zip(*found, strict=True))
    return ActiveLatents(token, latent, value, len(tokens))


def sparse_decode(sae: SparseAutoencoder, active: ActiveLatents) -> Tensor:
    """z W_dec + b_dec from the active latents alone: [n * t, d] float32."""
    return _sum_rows(sae, active, torch.zeros_like(active.token), 1)[0] + sae.b_dec


def masked_reconstructions(sae: SparseAutoencoder, active: ActiveLatents, ranks: Tensor, ks: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions with the k first latents kept, and with the k first removed, at every k at once.

    Decoding is linear: latents are put into one bucket between successive k, each bucket is decoded once, and the running
    sum over buckets is `on_k`; what is left of the whole is `off_k`.

    Args:
        sae: the autoencoder.
        active: active latents of one image's tokens [t].
        ranks: [s] int64, place of each latent in the ranking, 0 first.
        ks: [k] int64, ascending, in 1..s.

    Returns: (on, off), each [k, t, d] float32, b_dec included.
    """
    bucket = torch.searchsorted(ks, ranks[active.latent], right=True)
    parts = _sum_rows(sae, active, bucket, len(ks) + 1)
    on = parts[:-1].cumsum(dim=0)
    full = parts.sum(dim=0)
    return on + sae.b_dec, (full - on) + sae.b_dec


def masked_reconstructions_plain(sae: SparseAutoencoder, x: Tensor, ranks: Tensor, ks: Tensor) -> tuple[Tensor, Tensor]:
    """The definition that `masked_reconstructions` is held to: x [t, d], dense encode, mask, dense decode for each k."""
    z = sae.encode(x)
    on = torch.stack([sae.decode(z * (ranks < k)) for k in ks])
    off = torch.stack([sae.decode(z * (ranks >= k)) for k in ks])
    return on, off


def _sum_rows(sae: SparseAutoencoder, active: ActiveLatents, bucket: Tensor, num_buckets: int) -> Tensor:
    """Per bucket and token the sum of value * W_dec[latent]: [num_buckets, n * t, d] float32."""
    cell = bucket * active.num_tokens + active.token
    order = torch.argsort(cell, stable=True)
    cells = num_buckets * active.num_tokens
    starts = torch.searchsorted(cell[order], torch.arange(cells, device=cell.device))
    rows = embedding_bag(active.latent[order], sae.W_dec, starts, mode="sum", per_sample_weights=active.value[order])
    return rows.view(num_buckets, active.num_tokens, -1)
