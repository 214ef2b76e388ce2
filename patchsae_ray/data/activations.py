"""Activations kept on disk or object store: a folder of safetensors files, one a unit. `data/README.md` states the format.

A unit's file is committed once and never changes. `cache.json`, written last, says what the activations are of.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from patchsae_ray import storage
from patchsae_ray.data.chunks import Chunk
from patchsae_ray.data.mixing import ChunkTokens
from patchsae_ray.errors import UserError
from patchsae_ray.names import ActivationDtype, Tokens

FORMAT = 1
CACHE_FILE = "cache.json"
DTYPES: dict[ActivationDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_MOST_HEADERS = 64


@dataclass(frozen=True)
class CacheRecord:
    """What `cache.json` says."""

    identity: Mapping[str, Any]
    """What the activations depend on: digests of CLIP's weights and of the adapter, hook, preprocessing, precision,
    digest of the manifest, tokens, dtype, images a forward pass."""
    tokens: Tokens
    tokens_per_image: int
    width: int
    dtype: ActivationDtype
    num_units: int
    num_images: int
    bad: list[tuple[int, str, str]]
    """(position, path, reason) of each image that could not be read."""
    format: int = FORMAT

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


def unit_file(folder: str, unit: int) -> str:
    """URI of a unit's file."""
    return storage.join(folder, f"unit-{unit:08d}.safetensors")


def unit_bytes(residual: Tensor, positions: np.ndarray, bad: list[tuple[int, str, str]], key: str) -> bytes:
    """A unit's file.

    Args:
        residual: [n, t, d] bf16 or fp32 of the unit's n readable images.
        positions: [n] int64.
        bad: its unreadable images.
        key: run key of the cache.
    """
    tensors = {"positions": torch.from_numpy(positions), "residual": residual.contiguous()}
    return save_safetensors(tensors, metadata={"format": str(FORMAT), "key": key, "bad": json.dumps(bad)})


def read_record(folder: str) -> CacheRecord:
    """`cache.json` of a finished cache.

    Raises: UserError where there is none, or it is of another format.
    """
    uri = storage.join(folder, CACHE_FILE)
    if not storage.exists(uri):
        raise UserError(
            f"--activations {folder}: no {CACHE_FILE} there; a folder that jobs/cache_activations.py finished would be right"
        )
    try:
        found = json.loads(storage.read_text(uri))
        record = CacheRecord(**{**found, "bad": [(int(p), str(path), str(why)) for p, path, why in found["bad"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{uri} is no record of cached activations: {error}") from error
    if record.format != FORMAT:
        raise UserError(f"{uri}: format {record.format}, expected {FORMAT}")
    return record


@dataclass(frozen=True)
class _Header:
    """Where a unit's tensors lie in its file."""

    positions: np.ndarray
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """Byte of the file at which `residual` begins."""
    bad: list[tuple[int, str, str]]


@dataclass
class ActivationCache:
    """Reads chunks of a cache by byte range; a unit's header is read once.

    Args:
        folder: the cache.
        record: its cache.json.
    """

    folder: str
    record: CacheRecord
    _headers: "OrderedDict[int, _Header]" = field(default_factory=OrderedDict)

    def chunk(self, chunk: Chunk, first_position: int, tokens: slice) -> ChunkTokens:
        """A chunk's tokens.

        Args:
            chunk: which images of which unit.
            first_position: of the unit's first image, in the data set.
            tokens: which of the cached tokens.

        Raises: UserError where a file is missing, cut short or not what cache.json says.
        """
        header = self._header(chunk.unit)
        low, high = np.searchsorted(header.positions, first_position + chunk.first + np.array([0, chunk.count]))
        image_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        begin = header.begin + int(low) * image_bytes
        data = _read_range(unit_file(self.folder, chunk.unit), begin, begin + int(high - low) * image_bytes)
        shape = (int(high - low), *header.shape[1:])
        values = torch.frombuffer(data, dtype=header.dtype).view(shape) if data else torch.empty(shape, dtype=header.dtype)
        within = range(first_position + chunk.first, first_position + chunk.first + chunk.count)
        bad = [row for row in header.bad if row[0] in within]
        return ChunkTokens(values[:, tokens], header.positions[low:high], bad)

    def _header(self, unit: int) -> _Header:
        found = self._headers.get(unit)
        if found is None:
            found = self._headers[unit] = _read_header(unit_file(self.folder, unit), self.record)
            while len(self._headers) > _MOST_HEADERS:
                self._headers.popitem(last=False)
        return found


def _read_header(uri: str, record: CacheRecord) -> _Header:
    size = storage.size(uri)
    damaged = f"{uri} is not a whole unit of cached activations; without it jobs/cache_activations.py --overwrite makes it anew"
    length = int.from_bytes(_read_range(uri, 0, 8), "little") if size >= 8 else size
    if length > size - 8:
        raise UserError(damaged)
    try:
        header = json.loads(_read_range(uri, 8, 8 + length))
        residual, positions, metadata = header["residual"], header["positions"], header["__metadata__"]
        dtype = _NAMES[residual["dtype"]]
        shape = tuple(residual["shape"])
        ends = [one["data_offsets"] for one in (residual, positions)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(damaged) from error
    if 8 + length + max(end for _, end in ends) != size:
        raise UserError(damaged)
    if shape[1:] != (record.tokens_per_image, record.width) or dtype != DTYPES[record.dtype]:
        raise UserError(f"{uri} holds {list(shape)} {residual['dtype']}, which is not what {CACHE_FILE} says")
    begin, end = (8 + length + offset for offset in ends[1])
    place = np.frombuffer(_read_range(uri, begin, end), dtype=np.int64)
    bad = [(int(position), str(path), str(why)) for position, path, why in json.loads(metadata["bad"])]
    return _Header(place, shape, dtype, 8 + length + ends[0][0], bad)


def _read_range(uri: str, begin: int, end: int) -> bytearray:
    """Bytes [begin, end) of a file.

    Raises: UserError where it is shorter; StoreError once the store has stayed away for too long.
    """
    filesystem, path = storage.filesystem_of(uri)

    def read() -> bytes:
        with storage.reaching(uri):
            found: bytes = filesystem.cat_file(path, start=begin, end=end) if end > begin else b""
        return found

    data = storage.patiently(read)
    if len(data) != end - begin:
        raise UserError(f"{uri} is cut short: {len(data)} bytes from {begin} on, expected {end - begin}")
    return bytearray(data)  # writable, which torch wants of a tensor's memory
