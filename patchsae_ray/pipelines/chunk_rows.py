"""The decode side of streamed training: a chunk's row → its pixels, in tasks on CPUs that import neither torch nor CLIP."""

import json
from typing import Any

import numpy as np
import ray

from patchsae_ray.data.chunks import Chunk
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import DecodedUnit, decode_images
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.decoding import MAX_DEATHS, Attempt
from patchsae_ray.storage import patiently

_ALONE = "decode by itself"
IMAGE_DEATHS = 2
"""Processes that an image may take with it, while it is decoded by itself, before it counts as unreadable."""


def row_of(chunk: Chunk) -> dict[str, Any]:
    """A chunk as a row of a Ray Data set."""
    return {"lane": chunk.lane, "ordinal": chunk.ordinal, "wanted": chunk.positions}


def chunk_of(row: dict[str, Any]) -> Chunk:
    """The reverse of `row_of`."""
    return Chunk(int(row["lane"]), int(row["ordinal"]), np.asarray(row["wanted"], np.int64))


def name_of(chunk: Chunk) -> str:
    """A chunk in words."""
    return f"chunk {chunk.ordinal} of lane {chunk.lane} (image {chunk.positions[0]} of the data set and {chunk.count - 1} more)"


class DecodeChunk:
    """A chunk's row → its pixels as one tensor cell.

    Where a process died at the chunk, its images are decoded one by one, each on record: an image that goes on taking its
    process with it is then known, counts as unreadable, and the others are not lost with it.

    Args:
        manifest: the images.
        image_size: side of the pixels.
        board: the actor that keeps the record.
        stream: name of the stream; what a stream leaves behind that ends with its worker is nobody's death.
    """

    def __init__(self, manifest: Manifest, image_size: int, board: Any, stream: str) -> None:
        self._manifest, self._image_size, self._board, self._stream = manifest, image_size, board, stream

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = chunk_of(row)
        images = [(self._stream, position) for position in chunk.positions.tolist()]
        blamed = int(ray.get(self._board.died.remote(_ALONE, images)))  # deaths that are some image's own
        key = (self._stream, chunk.lane, chunk.ordinal)
        attempt = Attempt(self._board, "decode", key, name_of(chunk), MAX_DEATHS + blamed)
        with attempt as failed:
            if failed:
                raise UserError(failed)
            decoded = self._one_by_one(chunk) if attempt.deaths else self._decode(chunk.positions)
        header = json.dumps({"bad": decoded.bad})
        kept = {"lane": chunk.lane, "ordinal": chunk.ordinal}
        return {**kept, "pixels": decoded.pixels, "positions": decoded.positions, "header": header}

    def _decode(self, positions: np.ndarray) -> DecodedUnit:
        return patiently(lambda: decode_images(self._manifest, positions, self._image_size))

    def _one_by_one(self, chunk: Chunk) -> DecodedUnit:
        parts = []
        for position in chunk.positions.tolist():
            key = (self._stream, position)
            with Attempt(self._board, _ALONE, key, f"image {position}", IMAGE_DEATHS) as failed:
                parts.append(self._unreadable(position, failed) if failed else self._decode(np.array([position])))
        return DecodedUnit(
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.labels for part in parts]),
            [row for part in parts for row in part.bad],
        )

    def _unreadable(self, position: int, reason: str) -> DecodedUnit:
        unit = self._manifest.units[self._manifest.units.at(position)]
        path = self._manifest.paths(unit)[position - unit.start]
        nothing = np.zeros(0, np.int64)
        pixels = np.zeros((0, self._image_size, self._image_size, 3), np.uint8)
        return DecodedUnit(pixels, nothing, nothing, [(position, path, reason)])
