"""Where a training worker's chunks come from: CLIP in the worker itself, cached activations, or actors (`streamed.py`).

All give the same tokens, rounded to the same dtype, for a chunk is what CLIP takes in one forward pass everywhere.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.data.activations import DTYPES, ActivationCache
from patchsae_ray.data.chunks import Chunk
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.mixing import ChunkTokens
from patchsae_ray.data.units import DecodedUnit, decode_images
from patchsae_ray.measure.residuals import ResidualBatches
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.names import ActivationDtype
from patchsae_ray.storage import patiently

T = TypeVar("T")

AHEAD_CHUNKS = 4
"""Chunks, at most, that are read or decoded while others are trained on."""


class ChunkSource(Protocol):
    """Gives the tokens of the chunks that are wanted, in their order."""

    def chunks(self, wanted: Iterator[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        """Without end, as `wanted`; closing it ends what works ahead."""
        ...


def ahead(wanted: Iterator[Chunk], work: Callable[[Chunk], T], most: int) -> Iterator[tuple[Chunk, T]]:
    """`work` of what is wanted, in order, up to `most` at once on threads of its own."""
    waiting: deque[tuple[Chunk, Future[T]]] = deque()
    pool = ThreadPoolExecutor(most, thread_name_prefix="ahead")
    try:
        while True:
            while len(waiting) < most:
                one = next(wanted)
                waiting.append((one, pool.submit(work, one)))
            one, future = waiting.popleft()
            yield one, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def decode_chunk(manifest: Manifest, chunk: Chunk, image_size: int) -> DecodedUnit:
    """Pixels of a chunk's readable images.

    Raises: as `decode_images`, once a store has stayed away for too long.
    """
    return patiently(lambda: decode_images(manifest, chunk.positions, image_size))


class ChunkTower:
    """CLIP up to the hook, a chunk at a time.

    Args:
        backbone: the frozen tower.
        tokens: which of an image's tokens.
        dtype: what they are rounded to.
        chunk_images: images a forward pass.
        device: cpu or cuda.
    """

    def __init__(self, backbone: Backbone, tokens: slice, dtype: ActivationDtype, chunk_images: int, device: str) -> None:
        self._residuals = ResidualBatches(backbone, chunk_images, device)
        self._tokens, self._dtype = tokens, DTYPES[dtype]
        self._empty = torch.empty(0, len(range(backbone.num_tokens)[tokens]), backbone.width, dtype=self._dtype)
        self.timer = StageTimer(device)

    @torch.inference_mode()
    def tokens(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels [n, h, w, 3] → tokens [n, t, d] on the CPU."""
        found = [x[:, self._tokens].to(self._dtype).cpu() for _, x in self._residuals.of(pixels, self.timer)]
        return torch.cat(found) if found else self._empty


@dataclass(frozen=True)
class Fused:
    """The worker runs CLIP itself; images are decoded ahead on threads.

    Args:
        manifest: the images.
        image_size: side of the pixels.
        tower: CLIP.
    """

    manifest: Manifest
    image_size: int
    tower: ChunkTower

    def chunks(self, wanted: Iterator[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        for one, decoded in ahead(wanted, lambda one: decode_chunk(self.manifest, one, self.image_size), AHEAD_CHUNKS):
            yield one, ChunkTokens(self.tower.tokens(decoded.pixels), decoded.positions, decoded.bad)


@dataclass(frozen=True)
class Cached:
    """Chunks of a cache, read ahead on threads.

    Args:
        cache: the cache.
        manifest: of the same images.
        tokens: which of the cached tokens.
        dtype: what they are rounded to.
        most_ahead: chunks that may be on their way; no more than the worker has lanes, for the buffer's bound.
    """

    cache: ActivationCache
    manifest: Manifest
    tokens: slice
    dtype: ActivationDtype
    most_ahead: int

    def chunks(self, wanted: Iterator[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        edges = self.manifest.units.edges()

        def read(one: Chunk) -> ChunkTokens:
            found = self.cache.images(one.positions, edges, self.tokens)
            return ChunkTokens(found.values.to(DTYPES[self.dtype]), found.positions, found.bad)

        return ahead(wanted, read, min(AHEAD_CHUNKS, self.most_ahead))
