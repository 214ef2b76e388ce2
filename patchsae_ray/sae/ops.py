"""The hot operations on latents, in slices: nothing of shape [n, t, s] is ever whole.

Each fast form stands beside the plain definition that a test holds it to.
Shapes: n images, t tokens, d width, s latents, k settings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from patchsae_ray.sae.model import SparseAutoencoder

SLICE_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}
"""Upper bound of one slice of latents [n, t, slice] in float32: near a CPU's cache, and few waits on a GPU."""

PIECE = 256
"""Rows that are summed one after the other on a GPU, at most: 0.1 ms at the 0.4 µs that a row takes when it is walked alone."""

HISTOGRAM_BINS = 32
HISTOGRAM_LOWEST = -20
"""Bin b counts activations in [2^(b - 20), 2^(b - 19)); the first also what is smaller, the last what is larger."""


@dataclass(frozen=True)
class ImageLatents:
    """What an image's tokens say of each latent."""

    sums: Tensor
    """[k, n, s] float32: sum of z over the image's tokens of each of k types."""
    counts: Tensor
    """[h, n, s] int32: tokens with z above each of h thresholds."""
    histogram: Tensor
    """[s, 32] int64: activations above 0 of all tokens, by octave."""
    num_tokens: int
    """t."""

    @property
    def means(self) -> Tensor:
        """[n, s] float32: mean of z over all tokens."""
        return self.sums.sum(dim=0) / self.num_tokens


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

    def within(self, per_image: int, part: slice) -> "ActiveLatents":
        """Those of a run of each image's tokens alone, numbered without the others.

        Args:
            per_image: t.
            part: the run, as a slice of the t tokens.
        """
        start, stop, _ = part.indices(per_image)
        if (start, stop) == (0, per_image):
            return self
        place = self.token.remainder(per_image)
        inside = (place >= start) & (place < stop)
        image, place = self.token[inside].div(per_image, rounding_mode="floor"), place[inside]
        num_tokens = self.num_tokens // per_image * (stop - start)
        return ActiveLatents(image * (stop - start) + place - start, self.latent[inside], self.value[inside], num_tokens)

    def image_means(self, num_images: int, num_latents: int) -> Tensor:
        """Mean of z over each image's tokens: [n, s] float32."""
        per_image = self.num_tokens // num_images
        cell = self.token.div(per_image, rounding_mode="floor") * num_latents + self.latent
        sums = sums_by_cell(cell, self.value.to(torch.float64), num_images * num_latents)
        return (sums / per_image).to(torch.float32).view(num_images, num_latents)


def sums_by_cell(cell: Tensor, value: Tensor, num_cells: int) -> Tensor:
    """[num_cells]: the sum of values [m] in each cell [m] int64, added in their order, so that it is the same every time.

    Sorted into runs, and a run added up: the atomics of a GPU's `index_add_` add reals in whatever order threads arrive.
    """
    order = torch.argsort(cell, stable=True)
    lengths = torch.bincount(cell, minlength=num_cells)
    return torch.segment_reduce(value[order], "sum", lengths=lengths, initial=0)


def slices(num_latents: int, num_tokens: int, device: str = "cpu") -> Iterator[slice]:
    """Slices of the latents whose activations on `num_tokens` tokens stay within SLICE_BYTES."""
    size = max(1, min(num_latents, SLICE_BYTES[device] // (4 * max(1, num_tokens))))
    for start in range(0, num_latents, size):
        yield slice(start, min(start + size, num_latents))


def reduce_latents(
    sae: SparseAutoencoder, x: Tensor, thresholds: Sequence[float], types: Tensor, keep: Tensor | None = None
) -> tuple[ImageLatents, ActiveLatents | None]:
    """Encode residuals and reduce over tokens, a slice of latents at a time, by way of the few that are active.

    Args:
        sae: the autoencoder.
        x: residuals [n, t, d].
        thresholds: h of them.
        types: [t] int64, type of each token, 0..k-1, each type there at least once.
        keep: [n] bool, images whose active latents are wanted; their tokens are numbered without the other images'.

    Returns: the reduction, and the active latents of the images in `keep`, if there are any.
    """
    n, t, _ = x.shape
    sums = torch.empty(int(types.max()) + 1, n, sae.d_sae, device=x.device)
    counts = torch.empty(len(thresholds), n, sae.d_sae, dtype=torch.int32, device=x.device)
    histogram = torch.empty(sae.d_sae, HISTOGRAM_BINS, dtype=torch.int64, device=x.device)
    wanted = torch.nonzero(keep).flatten() if keep is not None else None
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in slices(sae.d_sae, n * t, x.device.type):
        z = sae.encode(x.flatten(0, 1), part).to(torch.float32)
        width = z.shape[1]
        token, latent = z.nonzero(as_tuple=True)
        value = z[token, latent]
        cell = token.div(t, rounding_mode="floor") * width + latent
        sums[:, :, part] = _sums_by_type(z, cell, token, value, types, n)
        for index, threshold in enumerate(thresholds):
            counts[index, :, part] = torch.bincount(cell[value > threshold], minlength=n * width).view(n, width)
        bins = latent * HISTOGRAM_BINS + histogram_bin(value)
        histogram[part] = torch.bincount(bins, minlength=width * HISTOGRAM_BINS).view(width, HISTOGRAM_BINS)
        if keep is not None:
            chosen = keep[token.div(t, rounding_mode="floor")]
            kept.append((token[chosen], latent[chosen] + part.start, value[chosen]))
    reduced = ImageLatents(sums, counts, histogram, t)
    return reduced, _renumbered(kept, wanted, t) if wanted is not None and len(wanted) else None


def _sums_by_type(z: Tensor, cell: Tensor, token: Tensor, value: Tensor, types: Tensor, n: int) -> Tensor:
    """[k, n, slice] float32. On a GPU densely: there a scattered sum of reals adds in any order."""
    num_types, t, width = int(types.max()) + 1, len(types), z.shape[1]
    if z.is_cuda:
        dense = z.view(n, t, width)
        return torch.stack([dense[:, types == kind].sum(dim=1) for kind in range(num_types)])
    keys = types[token.remainder(t)] * (n * width) + cell
    found = torch.bincount(keys, weights=value.to(torch.float64), minlength=num_types * n * width)
    return found.to(torch.float32).view(num_types, n, width)


def _renumbered(kept: list[tuple[Tensor, Tensor, Tensor]], wanted: Tensor, t: int) -> ActiveLatents:
    token, latent, value = (torch.cat(column) for column in zip(*kept, strict=True))
    image = torch.searchsorted(wanted, token.div(t, rounding_mode="floor"))
    return ActiveLatents(image * t + token.remainder(t), latent, value, len(wanted) * t)


def histogram_bin(value: Tensor) -> Tensor:
    """Bin of each activation above 0: its octave, floor(log2 z), read exactly from the float's exponent."""
    octave = torch.frexp(value).exponent.to(torch.int64) - 1
    return (octave - HISTOGRAM_LOWEST).clamp(0, HISTOGRAM_BINS - 1)


def reduce_latents_plain(sae: SparseAutoencoder, x: Tensor, thresholds: Sequence[float], types: Tensor) -> ImageLatents:
    """The definition that `reduce_latents` is held to."""
    z = sae.encode(x).to(torch.float32)
    sums = torch.stack([z[:, types == kind].sum(dim=1) for kind in range(int(types.max()) + 1)])
    counts = torch.stack([(z > threshold).sum(dim=1, dtype=torch.int32) for threshold in thresholds])
    edges = 2.0 ** torch.arange(HISTOGRAM_LOWEST + 1, HISTOGRAM_LOWEST + HISTOGRAM_BINS, device=z.device)
    bins = torch.bucketize(z, edges, right=True)
    histogram = torch.stack([((bins == b) & (z > 0)).sum(dim=(0, 1)) for b in range(HISTOGRAM_BINS)], dim=1)
    return ImageLatents(sums, counts, histogram, x.shape[1])


def active_latents(sae: SparseAutoencoder, x: Tensor) -> ActiveLatents:
    """Encode residuals x [n, t, d] and keep the non-zero latents of every token."""
    tokens = x.flatten(0, 1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in slices(sae.d_sae, len(tokens), x.device.type):
        z = sae.encode(tokens, part).to(torch.float32)
        token, latent = z.nonzero(as_tuple=True)
        found.append((token, latent + part.start, z[token, latent]))
    token, latent, value = (torch.cat(column) for column in zip(*found, strict=True))
    return ActiveLatents(token, latent, value, len(tokens))


def sparse_decode(sae: SparseAutoencoder, active: ActiveLatents) -> Tensor:
    """z W_dec + b_dec from the active latents alone: [n * t, d] float32."""
    return _sum_rows(sae, active, active.token, active.num_tokens) + sae.b_dec


def masked_reconstructions(
    sae: SparseAutoencoder, active: ActiveLatents, ranks: Tensor, ks: Tensor, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reconstructions with the k first latents kept, and with the k first removed, at every k at once.

    Decoding is linear: latents are put into one bucket between successive k, each bucket is decoded once, and the running
    sum over buckets is `on_k`; what is left of the whole is `off_k`.

    Args:
        sae: the autoencoder.
        active: active latents of the tokens of n images, t each.
        ranks: [n, s] int64, place of each latent in the image's ranking, 0 first.
        ks: [k] int64, ascending, repeats allowed, from 1; those past s keep all.
        rest: what is added to each, [n, t, d] or what broadcasts to it; b_dec alone where it is left out.

    Returns: (on, off), each [n, k, t, d] float32.
    """
    n, t = len(ranks), active.num_tokens // len(ranks)
    image, place = active.token.div(t, rounding_mode="floor"), active.token.remainder(t)
    bucket = torch.searchsorted(ks, ranks[image, active.latent], right=True)
    buckets = len(ks) + 1
    parts = _sum_rows(sae, active, (image * buckets + bucket) * t + place, n * buckets * t).view(n, buckets, t, -1)
    base = (sae.b_dec if rest is None else rest).broadcast_to(n, t, sae.d_in)[:, None]
    running = parts.cumsum(dim=1)
    return running[:, :-1] + base, running[:, -1:] - running[:, :-1] + base


def masked_reconstructions_plain(sae: SparseAutoencoder, x: Tensor, ranks: Tensor, ks: Tensor) -> tuple[Tensor, Tensor]:
    """The definition that `masked_reconstructions` is held to: x [n, t, d], dense encode, mask, dense decode for each k."""
    z, places = sae.encode(x), ranks[:, None]
    on = torch.stack([sae.decode(z * (places < k)) for k in ks], dim=1)
    off = torch.stack([sae.decode(z * (places >= k)) for k in ks], dim=1)
    return on, off


def _sum_rows(sae: SparseAutoencoder, active: ActiveLatents, cell: Tensor, num_cells: int) -> Tensor:
    """Per cell the sum of value * W_dec[latent] over the active latents in it: [num_cells, d] float32."""
    order = torch.argsort(cell, stable=True)
    starts = torch.searchsorted(cell[order], torch.arange(num_cells, device=cell.device))
    return weighed_sums(sae.W_dec, active.latent[order], starts, active.value[order])


def weighed_sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Of each of b bags the weighed sum of its rows of a table, [b, d]; the same bit for bit each time.

    Args:
        table: [r, d].
        rows: [a] int64, bag after bag.
        starts: [b] int64, where each bag starts, ascending; equal ones are empty bags.
        weights: [a].
    """
    if table.is_cuda:
        return in_pieces(table, rows, starts, weights, PIECE)
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


def in_pieces(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor, piece: int) -> Tensor:
    """`weighed_sums`, bags cut into pieces of at most `piece` rows that are summed first.

    On a GPU one thread walks a whole bag: a latent that is active on 25,000 tokens would hold up all the others. There are as
    many pieces as there could be at most, the last of them empty, so that no number has to come from the GPU.
    """
    end = torch.full((1,), len(rows), device=starts.device)
    pieces = (torch.diff(starts, append=end) + piece - 1).div(piece, rounding_mode="floor").clamp_min(1)
    firsts = pieces.cumsum(dim=0) - pieces
    number = torch.arange(len(starts) + len(rows) // piece, device=rows.device)
    bag = torch.searchsorted(firsts, number, right=True) - 1
    begins = (starts[bag] + (number - firsts[bag]) * piece).clamp_max(len(rows))
    sums = embedding_bag(rows, table, begins, mode="sum", per_sample_weights=weights)
    return embedding_bag(number, sums, firsts, mode="sum")
