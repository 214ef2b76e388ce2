"""Activations kept on disk or object store: a folder of safetensors files, one a unit. `data/README.md` states the format.

A unit's file is committed once and never changes. `cache.json`, written last, says what the activations are of.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from patchsae_ray import storage
from patchsae_ray.data.mixing import ChunkTokens
from patchsae_ray.errors import StoreError, UserError
from patchsae_ray.names import ActivationDtype, Tokens

FORMAT = 1
CACHE_FILE = "cache.json"
DTYPES: dict[ActivationDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_MOST_HEADERS = 2**16
"""Kept in a process: about 300 bytes each, and 8 for each image of a unit that has unreadable ones."""
_START_BYTES = 2**14
_MOST_HEADER_BYTES = 2**24
_MEND = "without it jobs/cache_activations.py --overwrite makes it anew"


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

    positions: np.ndarray | None
    """[n] int64 of its readable images; None where they are `count` consecutive ones."""
    first: int
    """Position of the first readable image."""
    count: int
    begin: int
    """Byte of the file at which `residual` begins."""
    bad: dict[int, tuple[int, str, str]]
    """Row of each unreadable image, by position."""

    def place(self, position: int) -> int | None:
        """Which of the readable images is at a position; None where none is."""
        place = position - self.first if self.positions is None else int(np.searchsorted(self.positions, position))
        there = 0 <= place < self.count and (self.positions is None or int(self.positions[place]) == position)
        return place if there else None


class ActivationCache:
    """Reads single images of a cache by byte range, many at once; a unit's header is read once.

    Args:
        folder: the cache.
        record: its cache.json.
    """

    def __init__(self, folder: str, record: CacheRecord) -> None:
        self.folder, self.record = folder, record
        self._headers: OrderedDict[int, _Header] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationCache, (self.folder, self.record)  # another process reads the headers that it needs

    def images(self, positions: np.ndarray, edges: np.ndarray, tokens: slice) -> ChunkTokens:
        """The tokens of some images.

        Args:
            positions: [n] int64 of the images, in the order in which they are wanted.
            edges: [units + 1] position of each unit's first image.
            tokens: which of the cached tokens, consecutive ones.

        Raises: UserError where a file is missing, cut short or not what cache.json says; StoreError once the store has
            stayed away for too long.
        """
        units = np.searchsorted(edges, positions, side="right") - 1
        headers = self._headers_of(np.unique(units).tolist())
        record, dtype = self.record, DTYPES[self.record.dtype]
        start, stop, _ = tokens.indices(record.tokens_per_image)
        token_bytes = record.width * dtype.itemsize
        ranges, readable, bad = [], [], []
        for position, unit in zip(positions.tolist(), units.tolist(), strict=True):
            header = headers[unit]
            place = header.place(position)
            if place is None:
                bad.append(header.bad.get(position) or self._missing(unit, position))
                continue
            begin = header.begin + (place * record.tokens_per_image + start) * token_bytes
            ranges.append((unit_file(self.folder, unit), begin, begin + (stop - start) * token_bytes))
            readable.append(position)
        data = bytearray(b"".join(_read(ranges)))  # writable, which torch wants of a tensor's memory
        shape = (len(readable), stop - start, record.width)
        values = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        return ChunkTokens(values, np.array(readable, np.int64), bad)

    def _missing(self, unit: int, position: int) -> tuple[int, str, str]:
        raise UserError(f"{unit_file(self.folder, unit)} has no image {position}, which is not what {CACHE_FILE} says")

    def _headers_of(self, units: Sequence[int]) -> dict[int, _Header]:
        with self._lock:
            known = {unit: self._headers[unit] for unit in units if unit in self._headers}
        missing = [unit for unit in units if unit not in known]
        if missing:
            with ThreadPoolExecutor(min(storage.READING_THREADS, len(missing))) as pool:
                uris = [unit_file(self.folder, unit) for unit in missing]
                known.update(zip(missing, pool.map(lambda uri: _read_header(uri, self.record), uris), strict=True))
            with self._lock:
                self._headers.update((unit, known[unit]) for unit in missing)
                while len(self._headers) > _MOST_HEADERS:
                    self._headers.popitem(last=False)
        return known


def _read_header(uri: str, record: CacheRecord) -> _Header:
    start = storage.patiently(lambda: _read_start(uri))
    damaged = f"{uri} is not a whole unit of cached activations; {_MEND}"
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _MOST_HEADER_BYTES:
        raise UserError(damaged)
    try:
        header = json.loads(_part(uri, start, 8, 8 + length))
        residual, positions, metadata = header["residual"], header["positions"], header["__metadata__"]
        dtype, shape = _NAMES[residual["dtype"]], tuple(residual["shape"])
        bad = [(int(position), str(path), str(why)) for position, path, why in json.loads(metadata["bad"])]
        (begin, _), (low, high) = residual["data_offsets"], positions["data_offsets"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(damaged) from error
    if shape[1:] != (record.tokens_per_image, record.width) or dtype != DTYPES[record.dtype]:
        raise UserError(f"{uri} holds {list(shape)} {residual['dtype']}, which is not what {CACHE_FILE} says")
    places = np.frombuffer(_part(uri, start, 8 + length + low, 8 + length + high), dtype=np.int64)
    if len(places) != shape[0]:
        raise UserError(damaged)
    first = int(places[0]) if len(places) else 0
    consecutive = len(places) == 0 or int(places[-1]) - first == len(places) - 1
    return _Header(None if consecutive else places, first, len(places), 8 + length + begin, {row[0]: row for row in bad})


def _read_start(uri: str) -> bytes:
    """The first bytes of a file, as many as there are of _START_BYTES: most units' header and positions."""
    filesystem, path = storage.filesystem_of(uri)
    with storage.reaching(uri):
        found: bytes = filesystem.cat_file(path, start=0, end=_START_BYTES)
    return found


def _part(uri: str, start: bytes, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file whose first bytes are known."""
    return start[begin:end] if end <= len(start) else _read([(uri, begin, end)])[0]


def _read(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Raises: as `storage.read_ranges`, saying what would mend a file that is not whole."""
    try:
        return storage.patiently(lambda: storage.read_ranges(ranges))
    except UserError as error:
        if isinstance(error, StoreError):
            raise
        raise UserError(f"{error}; {_MEND}") from error
