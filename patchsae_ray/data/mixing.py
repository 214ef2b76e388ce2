"""Lanes filled with tokens: batches are drawn from a bounded buffer that breaks images up.

What is in memory is a chunk a lane and what its source has on the way. The buffer's content is a function of the cursors,
so a resumed run needs no copy of it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.data.chunks import Demand, LaneOrder, Wanted
from patchsae_ray.errors import UserError


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
    distinct_images: int
    """Images that its tokens come from."""
    bad: list[tuple[int, str, str]]
    """Unreadable images that were met."""

    def pinned(self) -> "TokenBatch":
        """The same in memory that a GPU copies from while it computes."""
        return replace(self, x=self.x.pin_memory(), is_cls=None if self.is_cls is None else self.is_cls.pin_memory())


class _Lane:
    """A lane's chunk, and how far it is drawn."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0, 0)  # [n * t, d]
        self.draws = np.zeros((0, 1), dtype=np.int64)

    def fill(self, order: LaneOrder, one: Wanted, content: ChunkTokens) -> None:
        self.draws = order.draws(one.epoch, one.chunk, len(content.values))
        self.tokens = content.values.flatten(0, 1)


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
        source: Iterator[tuple[Wanted, ChunkTokens]],
        cursors: np.ndarray,
        cls_place: int | None,
    ) -> None:
        self._order, self._demand, self._source, self._cls_place = order, demand, source, cls_place
        self._lanes = {lane: _Lane() for lane in lanes}
        self._cursors = np.zeros_like(cursors)
        self._cursors[list(lanes)] = cursors[list(lanes)]
        self._filled = dict.fromkeys(lanes, -1)
        self._early: dict[tuple[int, int], tuple[Wanted, ChunkTokens]] = {}
        self._bad: list[tuple[int, str, str]] = []
        self.most_tokens = 0
        """Largest number of tokens held so far."""

    def step(self, step: int) -> TokenBatch:
        """The worker's part of the batch of a step; steps are asked for in order.

        Raises: UserError where a chunk holds what is no number, or no image can be read.
        """
        shares = self._order.shares(step)
        pieces: list[Tensor] = []
        places: list[np.ndarray] = []
        distinct = 0
        t = self._order.drawing.tokens_per_image
        for lane in self._lanes:
            for tokens, drawn in self._take(lane, int(shares[lane])):
                pieces.append(tokens[torch.from_numpy(drawn)])
                places.append(drawn % t)
                distinct += len(np.unique(drawn // t))
        bad, self._bad = self._bad, []
        x = torch.cat(pieces) if pieces else torch.empty(0, 0)
        place = np.concatenate(places) if places else np.zeros(0, np.int64)
        is_cls = None if self._cls_place is None else torch.from_numpy(place == self._cls_place)
        return TokenBatch(x, is_cls, self._cursors.copy(), distinct, bad)

    def _take(self, lane: int, share: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(tokens [n * t, d], places of those drawn) until the share is full, from one chunk after the other."""
        held, empty = self._lanes[lane], 0
        while share > 0:
            ordinal, offset = (int(value) for value in self._cursors[lane])
            if self._filled[lane] != ordinal:
                self._fill(lane, ordinal)
            drawn = held.draws[offset : offset + share]
            if len(drawn):
                yield held.tokens, drawn.reshape(-1)
            share, offset = share - len(drawn), offset + len(drawn)
            self._cursors[lane] = (ordinal, offset) if offset < len(held.draws) else (ordinal + 1, 0)
            empty = 0 if len(drawn) else empty + 1
            if empty > len(self._order.table):
                raise UserError("no image of the data set can be read")

    def _fill(self, lane: int, ordinal: int) -> None:
        key = (lane, ordinal)
        self._lanes[lane].tokens = torch.empty(0, 0)
        while key not in self._early:
            one, content = next(self._source)
            content.check()
            self._bad += content.bad
            self._demand.short(one.lane, one.chunk.count - len(content.values))
            self._early[one.lane, one.ordinal] = one, content
        self._lanes[lane].fill(self._order, *self._early.pop(key))
        self._filled[lane] = ordinal
        held = sum(len(one.tokens) for one in self._lanes.values())
        early = sum(content.values.shape[0] * content.values.shape[1] for _, content in self._early.values())
        self.most_tokens = max(self.most_tokens, held + early)


def expected_distinct_images(num_images: int, tokens_per_image: int, batch_tokens: int) -> float:
    """Distinct images among `batch_tokens` tokens drawn at random from all tokens of a data set, without replacement.

    n (1 - C(T - t, B) / C(T, B)) with T = n t: the mean of the hypergeometric occupancy.
    """
    total = num_images * tokens_per_image
    if batch_tokens > total - tokens_per_image:
        return float(num_images)

    def log_choose(count: int) -> float:
        return math.lgamma(count + 1) - math.lgamma(count - batch_tokens + 1)

    return num_images * -math.expm1(log_choose(total - tokens_per_image) - log_choose(total))


def distinct_images(order: LaneOrder, steps: int) -> np.ndarray:
    """Distinct images in each of the first steps' batches, every image readable: the order alone, without tokens."""
    lanes = range(order.lanes)
    cursors = np.zeros((order.lanes, 2), dtype=np.int64)
    demand = Demand(order, lanes, cursors)
    t = order.drawing.tokens_per_image
    blank = ((one, ChunkTokens(torch.zeros(one.chunk.count, t, 0), np.arange(one.chunk.count))) for one in demand)
    mixer = TokenMixer(order, lanes, demand, blank, cursors, None)
    return np.array([mixer.step(step).distinct_images for step in range(min(steps, order.steps))])
