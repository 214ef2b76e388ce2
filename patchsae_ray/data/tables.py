"""The images of a data set as rows of Arrow, and the units that they are read in.

A row says where an image lies and what it is called. Rows come in parts, each made by whoever looked through that part of
the source: an Arrow file, in memory or not, of which a few batches are read as they are wanted. Labels are an array beside
them, for they are wanted all together as well.
"""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from threading import Lock
from typing import overload

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.shared_cache import SharedCache
from patchsae_ray.errors import NotFound, UserError, first_line

NO_LABEL = -1
ROWS_A_BATCH = 512
ROWS_A_PART = 65_536
"""Rows of a part's file, at most: about a megabyte."""
PART_CACHE_BYTES = 512 * 2**20
"""Of parts' files from elsewhere that a process keeps: those of some 50 million images."""
OPEN_FILES = 256
"""Parts' files on this machine that a process keeps open, at most."""
LABEL_CACHE_BYTES = 2**30
"""Of label arrays that a process keeps, 4 bytes an image: all but the largest data sets' are read once."""

IMAGE_SCHEMA = pa.schema(
    [
        ("uri", pa.dictionary(pa.int32(), pa.string())),  # the Parquet file, the tar, or the root of the folder
        ("name", pa.binary()),  # folder: path under the root; tar: the member's name; as bytes, for paths may be no UTF-8
        ("at", pa.int64()),  # Parquet: row of the file; tar: byte where the member's content begins
        ("size", pa.int64()),  # bytes of the image; Parquet: of the file that holds it, whose footer is at its end
    ]
)
"""A row of a part."""
ROW_SCHEMA = pa.schema([("uri", pa.string()), *list(IMAGE_SCHEMA)[1:], ("label", pa.int32())])
"""A row as it is read: with its label, -1 without one."""


@dataclass(frozen=True)
class Unit:
    """Consecutive images, the grain of work."""

    index: int
    start: int
    """Position of the first image in the canonical order."""
    images: pa.RecordBatch
    """Rows of ROW_SCHEMA."""

    @property
    def count(self) -> int:
        return int(self.images.num_rows)


@dataclass(frozen=True)
class Part:
    """Consecutive images of a data set: an Arrow file of batches of 512 rows, of which the last may be smaller."""

    count: int
    data: bytes = field(default=b"", repr=False)
    """The file's content, compressed: some ten bytes an image."""
    uri: str = ""
    """Where the file is, if its content is not in memory."""

    @classmethod
    def of(cls, rows: pa.Table) -> "Part":
        """A part in memory of rows of IMAGE_SCHEMA."""
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, IMAGE_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            for batch in rows.combine_chunks().to_batches(max_chunksize=ROWS_A_BATCH):
                writer.write_batch(batch)
        return cls(rows.num_rows, buffer.getvalue())

    def batch(self, number: int) -> pa.RecordBatch:
        """The batch of this number.

        Raises: UserError where its file is not there or damaged, StoreError where the store does not answer.
        """
        return _batch(self, number)

    def each(self) -> Iterator[pa.RecordBatch]:
        """The batches in order, kept nowhere; a store that does not answer is tried again for a while.

        Raises: as `batch`, StoreError once the store has stayed away for too long.
        """
        file = storage.patiently(lambda: _ArrowFile(self))
        for number in range(-(-self.count // ROWS_A_BATCH)):
            yield storage.patiently(partial(file.batch, number))

    def in_memory(self) -> "Part":
        """The same without its file.

        Raises: as `batch`.
        """
        if self.data:
            return self
        with _of_a_kept_manifest():
            return Part(self.count, storage.read_bytes(self.uri))


def rows_of(uris: Sequence[str], file: np.ndarray, names: pa.Array, at: np.ndarray, sizes: np.ndarray) -> pa.Table:
    """Rows of IMAGE_SCHEMA: `file` says which of `uris` each image is in.

    Raises: UserError where one of `uris` is no UTF-8.
    """
    for uri in uris:
        if not (uri.isascii() or os.fsencode(uri).decode(errors="ignore") == uri):
            shown = os.fsencode(uri).decode(errors="backslashreplace")
            raise UserError(f"{shown}: this name is not UTF-8; a name that is would be right")
    where = pa.DictionaryArray.from_arrays(pa.array(file, pa.int32()), pa.array(uris, pa.string()))
    columns = [where, names, pa.array(at, pa.int64()), pa.array(sizes, pa.int64())]
    return pa.Table.from_arrays(columns, schema=IMAGE_SCHEMA)


@dataclass(frozen=True, eq=False)
class UnitTable(Sequence[Unit]):
    """All images of a data set, by position and in units.

    Args:
        parts: the rows.
        edges_array: [units + 1] int64, as `edges` gives them.
        label_source: [images] int32 as the source has them, or the URI of such an array's file (little-endian).
        groups_array: [groups + 1] int64, as `group_edges` gives them; None where they are the units' edges.
    """

    parts: tuple[Part, ...]
    edges_array: np.ndarray
    label_source: np.ndarray | str
    groups_array: np.ndarray | None = None

    def edges(self) -> np.ndarray:
        """[units + 1] int64: position of each unit's first image, and the number of images at the end; always in memory."""
        return self.edges_array

    def group_edges(self) -> np.ndarray:
        """[groups + 1] int64: position at which each run begins that is best read as a whole, and the number of images."""
        return self.edges_array if self.groups_array is None else self.groups_array

    def labels(self) -> np.ndarray:
        """[images] int32: each image's label as the source has it, -1 without one."""
        uri = self.label_source
        return uri if isinstance(uri, np.ndarray) else _kept_labels(uri, int(self.edges_array[-1]))

    def at(self, position: int) -> int:
        """Index of the unit that holds an image.

        Raises: IndexError where there is no such position.
        """
        if not 0 <= position < self.edges_array[-1]:
            raise IndexError(position)
        return int(np.searchsorted(self.edges_array, position, side="right")) - 1

    def __len__(self) -> int:
        return len(self.edges_array) - 1

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self.read(range(len(self))[index])

    def read(self, index: int) -> Unit:
        """Unit `index`, without looking at the others; a store that does not answer is tried again for a while.

        Raises: UserError where a kept manifest's file is not there or damaged, StoreError once its store has stayed away for
            too long.
        """
        start, end = self.edges_array[index : index + 2].tolist()
        return Unit(index, start, self.take(np.arange(start, end)))

    def take(self, positions: np.ndarray) -> pa.RecordBatch:
        """Rows of ROW_SCHEMA of the images at any positions, in the order given.

        Raises: IndexError where there is no such position; otherwise as `read`.
        """
        return storage.patiently(lambda: self._take(positions))

    def _take(self, positions: np.ndarray) -> pa.RecordBatch:
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < self.edges_array[-1]:
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {self.edges_array[-1]} images")
        order = np.argsort(positions, kind="stable")
        starts = np.cumsum([0, *(part.count for part in self.parts)])
        which = np.searchsorted(starts, positions[order], side="right") - 1
        numbers, rows = np.divmod(positions[order] - starts[which], ROWS_A_BATCH)
        cuts = [0, *(np.flatnonzero((np.diff(which) != 0) | (np.diff(numbers) != 0)) + 1).tolist(), len(order)]

        def some(low: int, high: int) -> pa.Table:
            return _plain(self.parts[which[low]].batch(int(numbers[low])), rows[low:high])

        bounds = [(low, high) for low, high in pairwise(cuts) if high > low]
        if len(bounds) > 1 and any(part.uri and not storage.is_local(part.uri) for part in self.parts):
            with ThreadPoolExecutor(min(storage.READING_THREADS, len(bounds))) as pool:
                found = list(pool.map(lambda bound: some(*bound), bounds))
        else:
            found = [some(*bound) for bound in bounds]
        table = pa.concat_tables(found) if found else ROW_SCHEMA.remove(4).empty_table()
        inverse = np.empty(len(order), np.int64)
        inverse[order] = np.arange(len(order))
        labels = pa.array(self._labels_at(positions), pa.int32())
        rows = table.take(inverse).append_column(ROW_SCHEMA.field("label"), labels).combine_chunks().to_batches()
        return rows[0] if rows else pa.RecordBatch.from_pylist([], schema=ROW_SCHEMA)

    def _labels_at(self, positions: np.ndarray) -> np.ndarray:
        uri = self.label_source
        if isinstance(uri, str) and len(positions) and (np.diff(positions) == 1).all():
            first, last = int(positions[0]), int(positions[-1])
            with _of_a_kept_manifest():
                return np.frombuffer(storage.read_ranges([(uri, 4 * first, 4 * last + 4)])[0], "<i4")
        return self.labels()[positions]

    def picked(self, positions: np.ndarray, edges: np.ndarray) -> "UnitTable":
        """A table in memory of some of the images in the order given, in units of its own."""
        rows = pa.Table.from_batches([self.take(positions)])
        where = rows["uri"].combine_chunks().dictionary_encode()
        file, at, sizes = where.indices.to_numpy(), rows["at"].to_numpy(), rows["size"].to_numpy()
        part = Part.of(rows_of(where.dictionary.to_pylist(), file, rows["name"].combine_chunks(), at, sizes))
        return UnitTable((part,), edges, rows["label"].to_numpy())

    def in_memory(self) -> "UnitTable":
        """The same table without its files, for machines that do not have them."""
        return replace(self, parts=tuple(part.in_memory() for part in self.parts), label_source=np.array(self.labels()))


def _plain(batch: pa.RecordBatch, rows: np.ndarray) -> pa.Table:
    """Some rows of a batch, free of the dictionary of all files of its part."""
    taken = pa.Table.from_batches([batch]).take(pa.array(rows))
    return taken.set_column(0, "uri", taken["uri"].cast(pa.string()))


class _ArrowFile:
    """A part's file: on this machine its batches are read as they are wanted, from elsewhere it is taken whole.

    Raises: as `Part.batch`.
    """

    def __init__(self, part: Part) -> None:
        self._uri = part.uri or "the manifest in memory"
        if part.data or not storage.is_local(part.uri):
            content = part.in_memory().data
            self.weight, source = len(content), pa.BufferReader(content)
        else:
            with _of_a_kept_manifest():
                file = storage.open_read(part.uri)
            self.weight, source = PART_CACHE_BYTES // OPEN_FILES, pa.PythonFile(file, mode="r")
        with self._parsing():
            self._reader = pa.ipc.open_file(source)
        self._lock = Lock()  # the reader is not made for several threads

    def batch(self, number: int) -> pa.RecordBatch:
        with self._lock, self._parsing():
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
        return batch

    @contextmanager
    def _parsing(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{self._uri} is damaged ({first_line(error)}); --relist makes it again") from error


_files: SharedCache[_ArrowFile] = SharedCache(PART_CACHE_BYTES, lambda file: file.weight)


@lru_cache(maxsize=256)
def _batch(part: Part, number: int) -> pa.RecordBatch:
    return _files.get(part.uri or part, partial(_ArrowFile, part)).batch(number)


_labels: SharedCache[np.ndarray] = SharedCache(LABEL_CACHE_BYTES, lambda labels: labels.nbytes)


def _kept_labels(uri: str, count: int) -> np.ndarray:
    """[count] int32 of a kept manifest, read once by a process."""

    def read() -> np.ndarray:
        with _of_a_kept_manifest():
            content = storage.read_bytes(uri)
        if len(content) != 4 * count:
            raise UserError(f"{uri} is damaged: {len(content)} bytes, expected {4 * count}; --relist makes it again")
        return np.frombuffer(content, "<i4")

    return _labels.get(uri, read)


@contextmanager
def _of_a_kept_manifest() -> Iterator[None]:
    """What is wrong with one of its files is put right by making it anew."""
    try:
        yield
    except NotFound as error:
        raise NotFound(f"{error}, which a kept manifest needs; --relist makes it again") from error
