"""Parquet by byte ranges: the footer, and the pages of one column of some row groups, are all that is read of a file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from patchsae_ray import storage
from patchsae_ray.data.manifest import ROW_GROUP_CACHE_BYTES
from patchsae_ray.data.shared_cache import SharedCache
from patchsae_ray.errors import UserError, first_line

TAIL_BYTES = 64 * 2**10
"""Read of a file's end, at first; most footers are smaller."""
FOOTER_CACHE_BYTES = 16 * 2**20
REPEATED_BYTES = 512 * 2**20
"""That a row group's images may take beyond those of its different values; rows that come after are bad rows."""
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises for damaged bytes; they are in memory by then, so that it is no store's fault."""


@dataclass(frozen=True)
class Footer:
    """Where a file's columns lie."""

    uri: str
    metadata: Any
    """pyarrow's FileMetaData."""
    raw: bytes
    """As it lies in the file."""

    starts: np.ndarray
    """[row groups + 1] int64: first row of each, and the number of rows."""

    def chunks(self, group: int, column: str) -> list[tuple[int, int]]:
        """(first byte, byte after the last) of each part of a column, which may be nested, in a row group."""
        found = self.metadata.row_group(group)
        parts = [found.column(index) for index in range(found.num_columns)]
        parts = [part for part in parts if part.path_in_schema == column or part.path_in_schema.startswith(f"{column}.")]
        begins = [min(filter(None, (part.dictionary_page_offset, part.data_page_offset))) for part in parts]
        return [(begin, begin + part.total_compressed_size) for begin, part in zip(begins, parts, strict=True)]


def read_footer(uri: str, size: int) -> Footer:
    """A file's footer.

    Args:
        uri: the file.
        size: its bytes.

    Raises: UserError where it is no whole Parquet file of that size, StoreError where the store does not answer.
    """
    start = max(0, size - TAIL_BYTES)
    tail = storage.read_ranges([(uri, start, size)])[0]
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] == b"PAR1" and len(tail) < length + 8 <= size:
        tail = storage.read_ranges([(uri, size - length - 8, start)])[0] + tail
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail))
    except _PARQUET_ERRORS as error:
        raise UserError(f"{uri} is not a whole Parquet file: {first_line(error)}") from error
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    return Footer(uri, metadata, tail[-8 - length : -8], np.cumsum([0, *rows]))


def read_columns(footer: Footer, groups: Sequence[int], column: str, once: bool = False) -> Any:
    """A column of some row groups, as pyarrow's ChunkedArray; only its bytes are read.

    Args:
        footer: of the file.
        groups: indices of the row groups.
        column: its name; it may be nested.
        once: hold equal values once, as a dictionary: a few bytes of a file may stand for many rows of a large value.

    Raises: DamagedColumn where they do not decode, or where with `once` what is repeated would take over REPEATED_BYTES as
        it is read row by row; StoreError where the store does not answer.
    """
    chunks = [chunk for group in groups for chunk in footer.chunks(group, column)]
    contents = storage.read_ranges([(footer.uri, begin, end) for begin, end in chunks])
    file = _KnownBytes({begin: content for (begin, _), content in zip(chunks, contents, strict=True)})
    names = [footer.metadata.schema.column(index).path for index in range(footer.metadata.num_columns)] if once else []
    rows: list[Any] = []

    def reader(dictionaries: list[str]) -> Any:
        source = pa.PythonFile(file, mode="r")
        return pq.ParquetFile(source, metadata=footer.metadata, read_dictionary=dictionaries, pre_buffer=False)

    try:
        found = reader(names).read_row_groups(list(groups), columns=[column], use_threads=False)[column]
        return _expect_bounded(found) if once else found
    except _PARQUET_ERRORS as error:
        reason = first_line(error)
    left = REPEATED_BYTES + sum(map(len, contents))
    try:  # what comes before the damaged page
        for batch in reader([]).iter_batches(1, row_groups=list(groups), columns=[column], use_threads=False):
            left -= batch.nbytes
            if left < 0:
                break
            rows.append(batch.column(0))
    except _PARQUET_ERRORS:
        pass
    raise DamagedColumn(pa.chunked_array(rows, type=footer.metadata.schema.to_arrow_schema().field(column).type), reason)


def _expect_bounded(column: Any) -> Any:
    """The same column.

    Raises: DamagedColumn, with the rows before, where its values row by row take over REPEATED_BYTES more than held once.
    """
    sizes = np.cumsum(np.concatenate([np.zeros(0, np.int64), *map(_row_bytes, column.chunks)]))
    fitting = int(np.searchsorted(sizes, column.nbytes + REPEATED_BYTES, side="right"))
    if fitting < len(column):
        raise DamagedColumn(column[:fitting], f"its rows repeat values to over {REPEATED_BYTES} bytes")
    return column


def _row_bytes(values: pa.Array) -> np.ndarray:
    """[rows] int64: bytes of each row's values that are held in dictionaries."""
    if pa.types.is_struct(values.type):
        return np.stack([_row_bytes(child) for child in values.flatten()]).sum(axis=0, dtype=np.int64)
    if not pa.types.is_dictionary(values.type):
        return np.zeros(len(values), np.int64)
    lengths = pc.binary_length(values.dictionary).take(values.indices)
    return lengths.fill_null(0).to_numpy().astype(np.int64)


class DamagedColumn(Exception):
    """A column's pages do not decode, or to too much."""

    def __init__(self, rows: Any, reason: str) -> None:
        super().__init__(reason)
        self.rows, self.reason = rows, reason


class _KnownBytes(io.RawIOBase):
    """A file of which only some ranges are there, by the byte at which each begins."""

    def __init__(self, ranges: dict[int, bytes]) -> None:
        self._ranges, self._at = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = max((begin + len(content) for begin, content in self._ranges.items()), default=0)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        for begin, content in self._ranges.items():
            if begin <= self._at < begin + len(content):
                found = content[self._at - begin : self._at - begin + size if size >= 0 else None]
                self._at += len(found)
                return found
        return b""


@dataclass(frozen=True)
class RowGroup:
    """The images of a row group."""

    images: Any
    """pyarrow's ChunkedArray of the rows that can be read: all, or those before a damaged page."""
    reason: str = ""
    """Why there are no more."""


_footers: SharedCache[Footer] = SharedCache(FOOTER_CACHE_BYTES, lambda footer: len(footer.raw))
_groups: SharedCache[RowGroup] = SharedCache(ROW_GROUP_CACHE_BYTES, lambda group: int(group.images.nbytes))


def known_footer(uri: str, size: int) -> Footer:
    """`read_footer`, kept in this process for as long as there is room."""
    return _footers.get((uri, size), lambda: read_footer(uri, size))


def read_group(footer: Footer, group: int, column: str, keep: bool) -> RowGroup:
    """The images of a row group.

    Args:
        footer: of the file.
        group: the row group's index.
        column: of the images.
        keep: in this process for as long as there is room, for others of its rows will be wanted.

    Raises: StoreError where the store does not answer.
    """

    def read() -> RowGroup:
        try:
            return RowGroup(read_columns(footer, [group], column, once=True))
        except DamagedColumn as damaged:
            return RowGroup(damaged.rows, damaged.reason)

    return _groups.get((footer.uri, len(footer.raw), group, column), read) if keep else read()
