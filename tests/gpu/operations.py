"""The operations on latents, on a device against the CPU. Needs torch, numpy and safetensors alone.

Sums in another order put a pre-activation within rounding of 0 on its other side now and then, so counts are held to a share.
"""

import time

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.data.mixing import TokenBatch
from patchsae_ray.measure.latents import LatentStatistics, TopImages
from patchsae_ray.measure.matmul import matmul_rate
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.pipelines.devices import device_name
from patchsae_ray.sae import ops
from patchsae_ray.sae.model import SparseAutoencoder, initialise
from tests.gpu.figures import Figure, apart, at_most, has_gpu, unequal

IMAGES, TOKENS, WIDTH, LATENTS = 6, 17, 64, 1500
FLIPS = 1e-3
TYPES = torch.tensor([0, *[1] * (TOKENS - 1)])


def make_sae(width: int = WIDTH, latents: int = LATENTS, level: float = -1.0) -> SparseAutoencoder:
    """Random, with biases around `level`, so that a few per cent of the latents are active."""
    sae, generator = SparseAutoencoder(width, latents), torch.Generator().manual_seed(0)
    initialise(sae, generator)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.normal_(level, 0.3, generator=generator)
        sae.b_dec.normal_(0, 0.3, generator=generator)
    return sae.requires_grad_(False)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reductions(device: str) -> list[Figure]:
    """`reduce_latents` against its plain definition, and that it repeats itself bit for bit."""
    sae, x, keep = make_sae(), normal(1, IMAGES, TOKENS, WIDTH), torch.arange(IMAGES) % 2 == 0
    plain = ops.reduce_latents_plain(sae, x, (0.2, 0.5), TYPES)
    sae, x, types, keep = sae.to(device), x.to(device), TYPES.to(device), keep.to(device)
    (found, kept), (again, _) = (ops.reduce_latents(sae, x, (0.2, 0.5), types, keep) for _ in range(2))
    assert kept is not None
    return [
        apart("sums", found.sums, plain.sums, 1e-5),
        unequal("counts", found.counts, plain.counts, FLIPS),
        unequal("histogram", found.histogram, plain.histogram, FLIPS),
        unequal("sums, repeated", again.sums, found.sums),
        unequal("histogram, repeated", again.histogram, found.histogram),
        apart("kept latents' decoding", ops.sparse_decode(sae, kept), sae.to("cpu")(x[keep].cpu()).flatten(0, 1), 1e-5),
    ]


def decoding(device: str) -> list[Figure]:
    """Active latents and what is decoded from them, fp32 and bf16."""
    sae, x = make_sae(), normal(1, IMAGES, TOKENS, WIDTH)
    plain = sae(x).flatten(0, 1)
    means = sae.encode(x).mean(dim=1)
    active = ops.active_latents(sae.to(device), x.to(device))
    inside = active.within(TOKENS, slice(1, TOKENS))
    figures = [
        apart("sparse_decode", ops.sparse_decode(sae, active), plain, 1e-5),
        unequal("sparse_decode, repeated", ops.sparse_decode(sae, active), ops.sparse_decode(sae, active)),
        apart("image_means", active.image_means(IMAGES, LATENTS), means, 1e-5),
        apart("within", ops.sparse_decode(sae, inside), plain.view(IMAGES, TOKENS, -1)[:, 1:].flatten(0, 1), 1e-5),
    ]
    low = make_sae().to(device).cast_encoder(torch.bfloat16)
    found = ops.sparse_decode(low, ops.active_latents(low, x.to(device, torch.bfloat16)))
    return [*figures, apart("sparse_decode in bf16", found, plain, 2e-2)]


def masking(device: str) -> list[Figure]:
    """Masked reconstructions against mask and decode."""
    sae, x = make_sae(), normal(2, IMAGES, TOKENS, WIDTH)
    ranks = normal(3, IMAGES, LATENTS).argsort(dim=1)
    ks = torch.tensor([1, 10, 10, 300, LATENTS + 5])
    plain = ops.masked_reconstructions_plain(sae, x, ranks, ks)
    sae = sae.to(device)
    found = ops.masked_reconstructions(sae, ops.active_latents(sae, x.to(device)), ranks.to(device), ks.to(device))
    return [apart(name, ours, wanted, 1e-5) for name, ours, wanted in zip(("on", "off"), found, plain, strict=True)]


def long_bags(device: str) -> list[Figure]:
    """A bag of 25,000 rows among short and empty ones."""
    lengths = [25_000, 0, *[5] * 4999]
    rows, weights = torch.arange(sum(lengths)) % 997, normal(4, sum(lengths))
    table, starts = normal(5, 997, WIDTH), torch.tensor([0, *lengths[:-1]]).cumsum(0)
    bag = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    plain = torch.zeros(len(lengths), WIDTH, dtype=torch.float64).index_add_(0, bag, (table[rows] * weights[:, None]).double())
    given = [one.to(device) for one in (table, rows, starts, weights)]
    found, again = ops.weighed_sums(*given), ops.weighed_sums(*given)
    pieces = ops.in_pieces(*given, 7)
    return [
        apart("weighed_sums", found, plain, 1e-5),
        unequal("weighed_sums, repeated", again, found),
        apart("in pieces of 7", pieces, plain, 1e-5),
    ]


def top_images(device: str) -> list[Figure]:
    """Top lists and statistics: from the same reduced latents the very same."""
    sae, x = make_sae(), normal(1, 4 * IMAGES, TOKENS, WIDTH)
    reduced = ops.reduce_latents_plain(sae, x, (0.2,), TYPES)
    positions, labels = torch.arange(4 * IMAGES) * 1000, torch.arange(4 * IMAGES) % 5
    tops = [TopImages(LATENTS, 4, where) for where in ("cpu", device)]
    for where, top in zip(("cpu", device), tops, strict=True):
        for part in torch.arange(4 * IMAGES).split(IMAGES):
            top.update(reduced.means[part].to(where), positions[part].to(where), labels[part].to(where))
    statistics = [LatentStatistics(LATENTS, 4, (1, TOKENS - 1), 1, where) for where in ("cpu", device)]
    for where, one in zip(("cpu", device), statistics, strict=True):
        fields = (getattr(reduced, name).to(where) for name in ("sums", "counts", "histogram"))
        one.update(ops.ImageLatents(*fields, num_tokens=TOKENS), positions, labels)
    plain, found = (one.to_arrays() for one in statistics)
    exact = [name for name in plain if name != "sums"]
    figures = [unequal(f"statistics: {name}", torch.from_numpy(found[name]), torch.from_numpy(plain[name])) for name in exact]
    return [
        unequal("top entries", tops[1].entries, tops[0].entries),
        unequal("top labels", tops[1].labels, tops[0].labels),
        unequal("top positions", tops[1].positions, tops[0].positions),
        unequal("top values", tops[1].values, tops[0].values),
        *figures,
        apart("statistics: sums", torch.from_numpy(found["sums"]), torch.from_numpy(plain["sums"]), 1e-6),
    ]


def timing(device: str) -> list[Figure]:
    """The stage timer waits for the device; the rate of products is a number."""
    timer, x = StageTimer(device), normal(0, 512, 512).to(device)
    started = time.perf_counter()
    for _ in range(20):
        x @ x
    timer.mark("product")
    figures = [
        at_most("seconds charged, over those that passed", timer.seconds["product"] - (time.perf_counter() - started), 0.1)
    ]
    if has_gpu(device):
        figures.append(at_most("work left after a mark", float(not torch.cuda.current_stream().query()), 0.0))
    rate = matmul_rate(device, torch.float32, seconds=0.02) if has_gpu(device) or device == "cpu" else 1e9
    return [*figures, at_most("1e6 over the rate of fp32 products", 1e6 / rate, 1.0)]


def pinned_batches(device: str) -> list[Figure]:
    """A batch through pinned memory to the device, as training copies it."""
    batch = TokenBatch(normal(6, 50, WIDTH), torch.arange(50) % 5 == 0, np.zeros((1, 2), np.int64), np.arange(10), None, [])
    if device != "cuda":
        return [unequal("tokens", batch.x.to(device, torch.float32, non_blocking=True), batch.x)]
    pinned = batch.pinned()
    assert pinned.is_cls is not None
    assert batch.is_cls is not None
    there, cls = (one.to(device, non_blocking=True) for one in (pinned.x, pinned.is_cls))
    torch.cuda.synchronize()
    held = float(not (pinned.x.is_pinned() and pinned.is_cls.is_pinned()))
    return [at_most("not pinned", held, 0.0), unequal("tokens", there, batch.x), unequal("cls", cls, batch.is_cls)]


def device_names(device: str) -> list[Figure]:
    """The model of the device, which is on record beside results."""
    name = device_name(device if has_gpu(device) else "cpu")
    return [at_most("nameless devices", float(len(name) < 3), 0.0)]


CASES = (reductions, decoding, masking, long_bags, top_images, timing, pinned_batches, device_names)
