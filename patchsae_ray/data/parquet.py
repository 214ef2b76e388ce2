"""Parquet by byte ranges: the footer, and the pages of one column of some row groups, are all that is read of a file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchsae_ray import storage
from patchsae_ray.data.manifest import ROW_GROUP_CACHE_BYTES
from patchsae_ray.data.shared_cache import SharedCache
from patchsae_ray.errors import UserError, first_line

TAIL_BYTES = 64 * 2**10
"""Read of a file's end, at first; most footers are smaller."""
FOOTER_CACHE_BYTES = 16 * 2**20
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


def read_columns(footer: Footer, groups: Sequence[int], column: str) -> Any:
    """A column of some row groups, as pyarrow's ChunkedArray; only its bytes are read.

    Raises: DamagedColumn where they do not decode, StoreError where the store does not answer.
    """
    chunks = [chunk for group in groups for chunk in footer.chunks(group, column)]
    contents = storage.read_ranges([(footer.uri, begin, end) for begin, end in chunks])
    file = _KnownBytes({begin: content for (begin, _), content in zip(chunks, contents, strict=True)})
    rows: list[Any] = []
    try:
        reader = pq.ParquetFile(pa.PythonFile(file, mode="r"), metadata=footer.metadata, pre_buffer=False)
        return reader.read_row_groups(list(groups), columns=[column], use_threads=False)[column]
    except _PARQUET_ERRORS as error:
        reason = first_line(error)
    try:  # what comes before the damaged page
        for batch in reader.iter_batches(1, row_groups=list(groups), columns=[column], use_threads=False):
            rows.append(batch.column(0))
    except _PARQUET_ERRORS:
        pass
    raise DamagedColumn(pa.chunked_array(rows, type=footer.metadata.schema.to_arrow_schema().field(column).type), reason)


class DamagedColumn(Exception):
    """A column's pages do not decode."""

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
            return RowGroup(read_columns(footer, [group], column))
        except DamagedColumn as damaged:
            return RowGroup(damaged.rows, damaged.reason)

    return _groups.get((footer.uri, len(footer.raw), group, column), read) if keep else read()
