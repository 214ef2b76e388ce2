"""What training reads at a time: single images wherever one can be read by itself, whole row groups of large Parquet files.

A chunk is what one lane holds: images that are read together and run through CLIP together. The chunks of lane l are
numbered by an ordinal from 0; which images they hold is a function of (seed, lanes, lane, ordinal) alone. The lanes' first
chunks grow from a part of a chunk to a whole one, so that the lanes come to their ends at different steps, and fetching is
steady from then on.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from patchsae_ray.data.permutation import Permutation

_ORDER = 0
"""Stream of random numbers that orders images and groups; `chunks` has others."""


class Grain(Protocol):
    """Which images the chunks of a run hold."""

    @property
    def num_images(self) -> int:
        """Images of the data set."""
        ...

    @property
    def num_chunks(self) -> int:
        """Chunks of an epoch."""
        ...

    @property
    def chunk_images(self) -> int:
        """Images of the largest chunk."""
        ...

    def count(self, seed: int, lanes: int, lane: int, ordinal: int) -> int:
        """Images of a chunk; 0 where there is nothing left for it."""
        ...

    def positions(self, seed: int, lanes: int, lane: int, ordinal: int) -> np.ndarray:
        """[count] int64: positions in the data set of a chunk's images."""
        ...

    def describe(self) -> str:
        """For the run's identity and its lines."""
        ...


@dataclass(frozen=True)
class SingleImages:
    """Chunks of images that lie anywhere: each epoch is a permutation of all images, and the epochs follow one another.

    Args:
        num_images: of the data set.
        chunk_images: images a chunk.
    """

    num_images: int
    chunk_images: int

    @property
    def num_chunks(self) -> int:
        return -(-self.num_images // self.chunk_images)

    def count(self, seed: int, lanes: int, lane: int, ordinal: int) -> int:
        return self.chunk_images if ordinal else _first_size(self.chunk_images, lanes, lane)

    def positions(self, seed: int, lanes: int, lane: int, ordinal: int) -> np.ndarray:
        firsts = _first_starts(self.chunk_images, lanes)
        start = int(firsts[lane]) if ordinal == 0 else int(firsts[-1]) + ((ordinal - 1) * lanes + lane) * self.chunk_images
        places = np.arange(start, start + self.count(seed, lanes, lane, ordinal))
        epochs, places = np.divmod(places, self.num_images)
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            found[epochs == epoch] = _permutation(self.num_images, seed, epoch)[places[epochs == epoch]]
        return found

    def describe(self) -> str:
        return "single images"


def _first_size(whole: int, lanes: int, lane: int) -> int:
    """Images of a lane's first chunk: `whole` in the last lane, a proportional part in the others, at least 1."""
    return -(-whole * (lane + 1) // lanes)


@lru_cache(maxsize=8)
def _first_starts(whole: int, lanes: int) -> np.ndarray:
    """[lanes + 1]: images in the first chunks of the lanes before each one, and of all lanes at the end."""
    return np.concatenate([[0], np.cumsum([_first_size(whole, lanes, lane) for lane in range(lanes)])])


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation(n, seed, _ORDER, epoch)


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Chunks that are whole row groups, in a permutation of its own each epoch: what can only be read together.

    The first groups of a run are cut in two: lane l begins with a part of group l, and the rest of group L - 1 - l follows.
    These groups are read twice, all others once an epoch.

    Args:
        edges: [groups + 1] int64: position of each group's first image, and the number of images at the end.
    """

    edges: np.ndarray

    @property
    def num_images(self) -> int:
        return int(self.edges[-1])

    @property
    def num_chunks(self) -> int:
        return len(self.edges) - 1

    @property
    def chunk_images(self) -> int:
        return int(np.diff(self.edges).max())

    def count(self, seed: int, lanes: int, lane: int, ordinal: int) -> int:
        first, end = self._bounds(seed, lanes, lane, ordinal)
        return end - first

    def positions(self, seed: int, lanes: int, lane: int, ordinal: int) -> np.ndarray:
        return np.arange(*self._bounds(seed, lanes, lane, ordinal))

    def _bounds(self, seed: int, lanes: int, lane: int, ordinal: int) -> tuple[int, int]:
        if ordinal < 2:
            owner = lane if ordinal == 0 else lanes - 1 - lane
            first, end = self._group(seed, owner)
            cut = first + -(-(end - first) * (owner + 1) // (lanes + 1))
            return (first, cut) if ordinal == 0 else (cut, end)
        return self._group(seed, (ordinal - 1) * lanes + lane)

    def _group(self, seed: int, number: int) -> tuple[int, int]:
        """Positions of the group that is the `number`-th of the run."""
        epoch, place = divmod(number, self.num_chunks)
        group = int(_permutation(self.num_chunks, seed, epoch)[np.array([place])][0])
        return int(self.edges[group]), int(self.edges[group + 1])

    def describe(self) -> str:
        return "row groups"
