"""The order in which training sees tokens: a function of (seed, epoch, step) alone.

A chunk is a run of consecutive images of a unit, as many as CLIP takes in one forward pass, so that every way of getting
its tokens computes the same numbers. Each epoch permutes all chunks; the epochs' chunks, laid end to end, are dealt to L
lanes in turn, and a lane holds one chunk at a time. A global batch takes an equal share of each lane. Worker r of N serves
lanes r, r + N, …: neither timing nor the number of workers enters.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from patchsae_ray.names import Batching

_ORDER, _DRAWS = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Chunk:
    """Images of one unit that are read and run through CLIP together."""

    unit: int
    first: int
    """Of the unit's images."""
    count: int


class ChunkTable:
    """All chunks of a data set by their number, in canonical order.

    Args:
        edges: [units + 1] position of each unit's first image, as `UnitTable.edges` gives them.
        chunk_images: images a chunk, at most.
    """

    def __init__(self, edges: np.ndarray, chunk_images: int) -> None:
        self._counts = np.diff(edges)
        self._chunk_images = chunk_images
        self._starts = np.concatenate([[0], np.cumsum(-(-self._counts // chunk_images))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Chunk:
        unit = int(np.searchsorted(self._starts, number, side="right")) - 1
        first = (number - int(self._starts[unit])) * self._chunk_images
        return Chunk(unit, first, min(self._chunk_images, int(self._counts[unit]) - first))


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
        table: the chunks.
        drawing: what is drawn.
        lanes: L.
        seed: of all draws.
        total: draws in all; the last step may be smaller than the others.
    """

    table: ChunkTable
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
        """[L] int64: draws from each lane. They differ by one at most, and what is over goes round."""
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

    def chunk(self, lane: int, ordinal: int) -> tuple[int, Chunk]:
        """(epoch, chunk) that is the lane's `ordinal`-th."""
        epoch, place = divmod(lane + ordinal * self.lanes, len(self.table))
        return epoch, self.table[int(_permutation(len(self.table), self.seed, epoch)[place])]

    def draws(self, epoch: int, chunk: Chunk, num_images: int) -> np.ndarray:
        """[draws, draw_tokens] int64: places in the chunk's readable images' tokens laid end to end, in order.

        Single tokens come in rounds with one random token of each image, so that tokens of one image lie far apart.

        Args:
            epoch: of the run.
            chunk: whose draws.
            num_images: its readable images.
        """
        drawing, t = self.drawing, self.drawing.tokens_per_image
        random = np.random.default_rng([self.seed, _DRAWS, epoch, chunk.unit, chunk.first])
        tokens = random.random((num_images, t)).argsort(axis=1)[:, : drawing.kept_tokens]
        if drawing.batching == "images":
            return (np.arange(num_images)[:, None] * t + np.sort(tokens, axis=1))[random.permutation(num_images)]
        images = random.random((drawing.kept_tokens, num_images)).argsort(axis=1)
        places = images * t + tokens[images, np.arange(drawing.kept_tokens)[:, None]]
        return places.reshape(-1, 1)


@lru_cache(maxsize=3)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


def num_lanes(buffer_tokens: int, chunk_images: int, num_chunks: int, drawing: Drawing, total: int) -> int:
    """Lanes whose chunks, and as many again on their way, stay within `buffer_tokens`.

    A power of two below 64 and a multiple of 64 above, so that usual numbers of workers get equal shares; no more than
    chunks or draws a step, so that every lane has something to give, nor than the run's draws fill.
    """
    in_buffer = buffer_tokens // (2 * chunk_images * drawing.tokens_per_image)
    of_run = total * drawing.draw_tokens // (chunk_images * drawing.kept_tokens)
    most = max(1, min(in_buffer, of_run, num_chunks, drawing.batch_size))
    return most // 64 * 64 if most >= 64 else 1 << (most.bit_length() - 1)


@dataclass(frozen=True)
class Wanted:
    """A chunk that a lane will need."""

    lane: int
    ordinal: int
    epoch: int
    chunk: Chunk


class Demand(Iterator[Wanted]):
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

    def __next__(self) -> Wanted:
        _, lane, ordinal = heapq.heappop(self._due)
        epoch, chunk = self._order.chunk(lane, ordinal)
        self._begins[lane] += chunk.count * self._order.drawing.image_draws
        heapq.heappush(self._due, (self._order.step_of(lane, self._begins[lane]), lane, ordinal + 1))
        return Wanted(lane, ordinal, epoch, chunk)

    def short(self, lane: int, images: int) -> None:
        """A chunk of the lane had so many images less than it should."""
        self._begins[lane] -= images * self._order.drawing.image_draws
