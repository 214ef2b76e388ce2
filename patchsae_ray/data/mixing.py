"""Lanes filled with tokens: batches are drawn from a bounded buffer that breaks images up.

What is in memory is what the lanes have not drawn yet, and what their source has on the way. The buffer's content is a
function of the cursors, so a resumed run needs no copy of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.data.chunks import LANE_BLOCKS, Chunk, Demand, LaneOrder
from patchsae_ray.errors import UserError

WINDOW_STEPS = 64
"""Successive batches whose images are counted together: PatchSAE calls a latent dead after as many without firing."""


@dataclass(frozen=True)
class ChunkTokens:
    """A chunk's tokens at the hook."""

    values: Tensor
    """[n, t, d] of its n readable images, on the CPU."""
    positions: np.ndarray
    """[n] int64: the images."""
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    """(position, path, reason) of each unreadable image."""

    def check(self) -> None:
        """Raises: UserError that names the first image with NaN or infinite tokens."""
        finite = torch.isfinite(self.values).flatten(1).all(dim=1)
        if not bool(finite.all()):
            position = int(self.positions[int(torch.nonzero(~finite)[0])])
            raise UserError(
                f"image {position} of the data set: NaN or infinite activations at the hook; "
                "sound CLIP weights, or --precision fp32, would be right"
            )


@dataclass(frozen=True)
class TokenBatch:
    """One worker's part of a global batch."""

    x: Tensor
    """[m, d], lanes in ascending order."""
    is_cls: Tensor | None
    """[m] bool, None where no token is CLS."""
    cursors: np.ndarray
    """[L, 2] int64 after the batch, of this worker's lanes; 0 for the others."""
    images: np.ndarray
    """[i] int64: the images that its tokens come from, by position, each once."""
    window_images: np.ndarray | None
    """The images of the last WINDOW_STEPS batches, after every so many; None in between."""
    bad: list[tuple[int, str, str]]
    """Unreadable images that were met."""

    def pinned(self) -> "TokenBatch":
        """The same in memory that a GPU copies from while it computes."""
        return replace(self, x=self.x.pin_memory(), is_cls=None if self.is_cls is None else self.is_cls.pin_memory())


class _Lane:
    """A lane's chunk: its tokens in the order of their draws, in blocks that are let go once they are used up."""

    def __init__(self) -> None:
        self._draws = np.zeros((0, 1), dtype=np.int64)
        self._blocks: list[tuple[int, Tensor]] = []
        self._positions = np.zeros(0, np.int64)
        self._tokens_per_image = 1

    def fill(self, order: LaneOrder, chunk: Chunk, content: ChunkTokens, offset: int) -> None:
        """Take a chunk of which `offset` draws were taken before."""
        self._draws = draws = order.draws(chunk, len(content.values))
        self._positions, self._tokens_per_image = content.positions, order.drawing.tokens_per_image
        tokens = content.values.flatten(0, 1)
        size = max(1, -(-len(draws) // LANE_BLOCKS))
        starts = range(offset // size * size, len(draws), size)
        self._blocks = [(start, tokens[torch.from_numpy(draws[start : start + size].reshape(-1))]) for start in starts]

    def empty(self) -> None:
        """Let go of everything."""
        self._draws, self._blocks = np.zeros((0, 1), dtype=np.int64), []

    def __len__(self) -> int:
        return len(self._draws)

    @property
    def held_tokens(self) -> int:
        return sum(len(tokens) for _, tokens in self._blocks)

    def take(self, offset: int, most: int) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
        """Up to `most` draws from `offset` on: their tokens, the tokens' places in their images, and the images."""
        draws = self._draws[offset : offset + most]
        end, width, pieces = offset + len(draws), draws.shape[1], []
        for start, tokens in self._blocks:
            low, high = (max(0, (edge - start) * width) for edge in (offset, end))
            if low < len(tokens) and high > low:
                pieces.append(tokens[low:high])
        self._blocks = [(start, tokens) for start, tokens in self._blocks if (end - start) * width < len(tokens)]
        image, place = np.divmod(draws.reshape(-1), self._tokens_per_image)
        return pieces, place, self._positions[np.unique(image)]


class TokenMixer:
    """Batches of one worker, step by step.

    Args:
        order: of the run.
        lanes: this worker's, ascending.
        demand: what they need.
        source: their chunks, in the order of `demand`.
        cursors: [L, 2] of every lane: where the run stands.
        cls_place: which of an image's tokens is CLS, None where none is.
    """

    def __init__(
        self,
        order: LaneOrder,
        lanes: Sequence[int],
        demand: Demand,
        source: Iterator[tuple[Chunk, ChunkTokens]],
        cursors: np.ndarray,
        cls_place: int | None,
    ) -> None:
        self._order, self._demand, self._source, self._cls_place = order, demand, source, cls_place
        self._lanes = {lane: _Lane() for lane in lanes}
        self._cursors = np.zeros_like(cursors)
        self._cursors[list(lanes)] = cursors[list(lanes)]
        self._filled = dict.fromkeys(lanes, -1)
        self._early: dict[tuple[int, int], tuple[Chunk, ChunkTokens]] = {}
        self._bad: list[tuple[int, str, str]] = []
        self._window: list[np.ndarray] = []
        self.most_tokens = 0
        """Largest number of tokens held so far."""
        self.chunks_filled = 0
        """Chunks that the lanes have taken so far."""

    def step(self, step: int) -> TokenBatch:
        """The worker's part of the batch of a step; steps are asked for in order.

        Raises: UserError where a chunk holds what is no number, or no image can be read.
        """
        shares = self._order.shares(step)
        pieces: list[Tensor] = []
        places, images = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for lane in self._lanes:
            for tokens, place, found in self._take(lane, int(shares[lane])):
                pieces += tokens
                places.append(place)
                images.append(found)
        bad, self._bad = self._bad, []
        x = torch.cat(pieces) if pieces else torch.empty(0, 0)
        is_cls = None if self._cls_place is None else torch.from_numpy(np.concatenate(places) == self._cls_place)
        distinct = np.unique(np.concatenate(images))
        return TokenBatch(x, is_cls, self._cursors.copy(), distinct, self._window_images(step, distinct), bad)

    def _window_images(self, step: int, images: np.ndarray) -> np.ndarray | None:
        self._window.append(images)
        if (step + 1) % WINDOW_STEPS:
            return None
        window, self._window = self._window, []
        return np.unique(np.concatenate(window)) if len(window) == WINDOW_STEPS else None

    def _take(self, lane: int, share: int) -> Iterator[tuple[list[Tensor], np.ndarray, np.ndarray]]:
        """What `_Lane.take` gives until the share is full, from one chunk after the other."""
        held, empty = self._lanes[lane], 0
        while share > 0:
            ordinal, offset = (int(value) for value in self._cursors[lane])
            if self._filled[lane] != ordinal:
                self._fill(lane, ordinal, offset)
            drawn = min(share, len(held) - offset)
            if drawn > 0:
                yield held.take(offset, drawn)
            share, offset = share - drawn, offset + drawn
            self._cursors[lane] = (ordinal, offset) if offset < len(held) else (ordinal + 1, 0)
            empty = 0 if drawn else empty + 1
            if empty > self._order.grain.num_chunks + 2:
                raise UserError("no image of the data set can be read")

    def _fill(self, lane: int, ordinal: int, offset: int) -> None:
        key = (lane, ordinal)
        self._filled[lane] = ordinal
        self._lanes[lane].empty()
        if not self._order.count(lane, ordinal):
            return
        while key not in self._early:
            chunk, content = next(self._source)
            content.check()
            self._bad += content.bad
            self._demand.short(chunk.lane, chunk.count - len(content.values))
            self._early[chunk.lane, chunk.ordinal] = chunk, content
        self._lanes[lane].fill(self._order, *self._early.pop(key), offset)
        self.chunks_filled += 1
        held = sum(one.held_tokens for one in self._lanes.values())
        early = sum(content.values.shape[0] * content.values.shape[1] for _, content in self._early.values())
        self.most_tokens = max(self.most_tokens, held + early)
