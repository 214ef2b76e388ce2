"""The order in which training sees tokens: a function of (seed, epoch, step) alone.

L lanes hold one chunk of images each (`grains` says which). A global batch takes an equal share of each lane, and a lane
gives one random token of each of its images in turn, so that a batch's tokens come from all images that are held. Worker r
of N serves lanes r, r + N, …: neither timing nor the number of workers enters.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from patchsae_ray.data.grains import Grain
from patchsae_ray.names import Batching

_DRAWS = 1
"""Stream of random numbers that draws tokens; `grains` has another."""

ORDER_VERSION = 2
"""Of the order that this module defines; a run of another version cannot be gone on with."""

LANE_BLOCKS = 8
"""Parts in which a lane's tokens are let go as they are used up."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Images that are read and run through CLIP together."""

    lane: int
    ordinal: int
    """Of the lane's chunks, from 0."""
    positions: np.ndarray
    """[n] int64: the images, by their position in the data set."""

    @property
    def count(self) -> int:
        """n."""
        return len(self.positions)


@dataclass(frozen=True)
class Drawing:
    """What is drawn from a chunk, and how much a step draws."""

    batching: Batching
    """tokens: single tokens, one of each image in turn; images: all tokens of an image together."""
    tokens_per_image: int
    """t, before `share`."""
    share: float
    """Of each image's tokens, drawn anew each epoch."""
    batch_size: int
    """Draws a step: tokens or images."""

    @property
    def kept_tokens(self) -> int:
        """Of each image: `share` of t, rounded, at least 1."""
        return max(1, round(self.share * self.tokens_per_image))

    @property
    def image_draws(self) -> int:
        """Draws an image."""
        return self.kept_tokens // self.draw_tokens

    @property
    def draw_tokens(self) -> int:
        """Tokens a draw."""
        return 1 if self.batching == "tokens" else self.kept_tokens


@dataclass(frozen=True)
class LaneOrder:
    """The whole order of a run.

    Args:
        grain: which images each chunk holds.
        drawing: what is drawn of them.
        lanes: L.
        seed: of all draws.
        total: draws in all; the last step may be smaller than the others.
    """

    grain: Grain
    drawing: Drawing
    lanes: int
    seed: int
    total: int

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return -(-self.total // self.drawing.batch_size)

    def step_draws(self, step: int) -> int:
        """Draws of a step, over all lanes."""
        return min(self.drawing.batch_size, self.total - step * self.drawing.batch_size)

    def shares(self, step: int) -> np.ndarray:
        """[L] int64: draws from each lane. Shares differ by at most one; the remainder rotates over the lanes by steps."""
        draws = self.step_draws(step)
        each, over = divmod(draws, self.lanes)
        shares = np.full(self.lanes, each, dtype=np.int64)
        shares[(step * (self.drawing.batch_size % self.lanes) + np.arange(over)) % self.lanes] += 1
        return shares

    def drawn(self, lane: int, step: int) -> int:
        """Draws from a lane in all steps before `step`: the sum of its shares."""
        each, over = divmod(self.drawing.batch_size, self.lanes)
        return step * each + max(0, -(-(step * over - lane) // self.lanes))

    def step_of(self, lane: int, draw: int) -> int:
        """The step that takes a lane's draw of this number, from 0."""
        low = draw * self.lanes // self.drawing.batch_size  # as if shares were fractions, and one less over
        step = max(0, low - 1)
        while self.drawn(lane, step + 1) <= draw:
            step += 1
        return step

    def count(self, lane: int, ordinal: int) -> int:
        """Images of a lane's chunk."""
        return self.grain.count(self.seed, self.lanes, lane, ordinal)

    def chunk(self, lane: int, ordinal: int) -> Chunk:
        """A lane's chunk."""
        return Chunk(lane, ordinal, self.grain.positions(self.seed, self.lanes, lane, ordinal))

    def draws(self, chunk: Chunk, num_images: int) -> np.ndarray:
        """[draws, draw_tokens] int64: places in the chunk's readable images' tokens laid end to end, in order.

        Single tokens come in rounds with one random token of each image, so that tokens of one image lie far apart.

        Args:
            chunk: whose draws.
            num_images: its readable images.
        """
        drawing, t = self.drawing, self.drawing.tokens_per_image
        random = np.random.default_rng([self.seed, _DRAWS, chunk.lane, chunk.ordinal])
        tokens = random.random((num_images, t)).argsort(axis=1)[:, : drawing.kept_tokens]
        if drawing.batching == "images":
            return (np.arange(num_images)[:, None] * t + np.sort(tokens, axis=1))[random.permutation(num_images)]
        images = random.random((drawing.kept_tokens, num_images)).argsort(axis=1)
        places = images * t + tokens[images, np.arange(drawing.kept_tokens)[:, None]]
        return places.reshape(-1, 1)


def num_lanes(buffer_tokens: int, grain: Grain, drawing: Drawing, total: int) -> int:
    """Lanes whose tokens, with those on their way, stay within `buffer_tokens`.

    A power of two below 64 and a multiple of 64 above, so that usual numbers of workers get equal shares; no more than
    chunks or draws a step, so that every lane has something to give, nor than the run's draws fill.
    """
    in_buffer = _lanes_that_hold(buffer_tokens / (grain.chunk_images * drawing.tokens_per_image))
    of_run = total * drawing.draw_tokens // (grain.chunk_images * drawing.kept_tokens)
    most = max(1, min(in_buffer, of_run, grain.num_chunks, drawing.batch_size))
    return most // 64 * 64 if most >= 64 else 1 << (most.bit_length() - 1)


def _lanes_that_hold(chunks: float) -> int:
    """Lanes that hold no more than so many chunks' tokens.

    A lane holds half of its chunk on average, uniformly between none and all of it, and half a block more. So L lanes hold
    L (1 / 2 + 1 / (2 LANE_BLOCKS)) on average, with a standard deviation of sqrt(L / 12) were they independent of each
    other, three of which are left free. Few lanes may all be full at once.
    """
    mean, spread = 0.5 + 0.5 / LANE_BLOCKS, 3 / 12**0.5
    root = ((spread**2 + 4 * mean * chunks) ** 0.5 - spread) / (2 * mean)  # of mean L + spread sqrt(L) = chunks
    return int(max(chunks, root**2))


class Demand(Iterator[Chunk]):
    """The chunks that some lanes will need, without end, in the order in which they will need them.

    A chunk is needed in the step that takes its first draw, which follows from the number of images of the chunks before it
    in its lane; images that turn out to be unreadable are told to `short`. The order says when a chunk is fetched, never
    what is drawn.

    Args:
        order: of the run.
        lanes: those of one worker.
        cursors: [L, 2] (ordinal of the chunk, draws taken from it) of every lane.
        step: before which the cursors stand.
    """

    def __init__(self, order: LaneOrder, lanes: Sequence[int], cursors: np.ndarray, step: int = 0) -> None:
        self._order = order
        self._begins = {lane: order.drawn(lane, step) - int(cursors[lane, 1]) for lane in lanes}
        self._due = [(step, lane, int(cursors[lane, 0])) for lane in lanes]
        heapq.heapify(self._due)

    def __next__(self) -> Chunk:
        while True:
            _, lane, ordinal = heapq.heappop(self._due)
            count = self._order.count(lane, ordinal)
            self._begins[lane] += count * self._order.drawing.image_draws
            heapq.heappush(self._due, (self._order.step_of(lane, self._begins[lane]), lane, ordinal + 1))
            if count:
                return self._order.chunk(lane, ordinal)

    def short(self, lane: int, images: int) -> None:
        """A chunk of the lane had so many images less than it should."""
        self._begins[lane] -= images * self._order.drawing.image_draws
