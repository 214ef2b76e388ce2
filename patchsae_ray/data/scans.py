"""Looking into Parquet files and tars: what they hold, pixels apart."""

import io
import json
import logging
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.listing import IMAGE_EXTENSIONS
from patchsae_ray.data.parquet import DamagedColumn, Footer, read_columns, read_footer
from patchsae_ray.data.tables import NO_LABEL
from patchsae_ray.errors import UserError, first_line

log = logging.getLogger(__name__)

TAR_BLOCK = 512
_MAX_CLS_BYTES = 64
_MAX_HEADER_BYTES = 2**20
"""Of a member's long name and of what else its header says."""
_MAX_LABEL = int(np.iinfo(np.int32).max)


@dataclass
class ParquetScan:
    """What one Parquet file holds, pixels apart."""

    uri: str
    size: int
    """Bytes of the file."""
    group_rows: np.ndarray
    """[row groups] int64."""
    image_bytes: int
    """Of the compressed image column."""
    footer: str
    """Digest of the footer."""
    there: bool
    """Whether it has the label column."""
    label_codes: np.ndarray
    """[rows] int32: numbers, or places in `values`; -1 without one."""
    labels: str = ""
    """Digest of all labels."""
    values: tuple[str, ...] = ()
    """Distinct string labels."""
    declared: tuple[str, ...] = ()
    """Class names that the schema's metadata declare."""

    @property
    def rows(self) -> int:
        return int(self.group_rows.sum())

    @property
    def highest(self) -> int:
        """Largest number of labels that are numbers."""
        return NO_LABEL if self.values else int(self.label_codes.max(initial=NO_LABEL))


def scan_parquet(uri: str, size: int, image_column: str, label_column: str) -> ParquetScan:
    """Look through one file: its footer and its labels are all that is read.

    Raises: UserError where it is damaged, has no images, or labels of a kind that are none.
    """
    footer = read_footer(uri, size)
    schema = footer.metadata.schema.to_arrow_schema()
    if image_column not in schema.names:
        raise UserError(f"{uri} has no column {image_column!r}; it has {', '.join(schema.names)}")
    groups = range(footer.metadata.num_row_groups)
    taken = sum(end - begin for group in groups for begin, end in footer.chunks(group, image_column))
    rows = np.diff(footer.starts)
    there = label_column in schema.names
    without = np.full(int(rows.sum()), NO_LABEL, np.int32)
    scan = ParquetScan(uri, size, rows, taken, storage.digest([footer.raw]), there, without)
    if there:
        scan.declared = _declared_names(schema, label_column)
        _scan_labels(scan, _label_column(footer, list(groups), label_column), label_column)
    return scan


def _label_column(footer: Footer, groups: list[int], name: str) -> Any:
    try:
        return read_columns(footer, groups, name)
    except DamagedColumn as error:
        raise UserError(f"{footer.uri}: the labels in column {name!r} are damaged: {error.reason}") from error


def _scan_labels(scan: ParquetScan, column: Any, name: str) -> None:
    kind = column.type
    if pa.types.is_integer(kind):
        labels = column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
        if labels.max(initial=0) > _MAX_LABEL:
            raise UserError(f"{scan.uri}: label column {name!r} holds {labels.max()}; numbers below 2^31 would be right")
        scan.label_codes = np.maximum(labels, NO_LABEL).astype(np.int32)
        scan.labels = storage.digest([labels.tobytes()])
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        strings = [None if value is None else str(value) for value in column.to_pylist()]
        scan.values = tuple(sorted({value for value in strings if value is not None}))
        place: dict[str | None, int] = {value: index for index, value in enumerate(scan.values)}
        scan.label_codes = np.array([place.get(value, NO_LABEL) for value in strings], np.int32)
        scan.labels = storage.digest(value for value in strings if value is not None)
    else:
        raise UserError(f"{scan.uri}: label column {name!r} is {kind}; integers or strings would be right")


class Labels:
    """The labels of all files of a Parquet data set.

    Raises: UserError where some files have them and others have not.
    """

    def __init__(self, scans: Sequence[ParquetScan], column: str) -> None:
        self.there = bool(scans) and scans[0].there
        for scan in scans:
            if scan.there != self.there:
                raise UserError(f"{scan.uri} has {'a' if scan.there else 'no'} column {column!r}, other files of it differ")
        self.values = tuple(sorted(set[str]().union(*(scan.values for scan in scans))))
        declared = next((scan.declared for scan in scans if scan.declared), ())
        self.classnames = (self.values or declared) if self.there else ()
        highest = max((scan.highest for scan in scans), default=NO_LABEL)
        self.num_classes = max(len(self.classnames), highest + 1) if self.there else 0


def numbered(codes: Sequence[np.ndarray], names: Sequence[Sequence[str]], values: Sequence[str]) -> np.ndarray:
    """Labels of several parts, each with names of its own, as places in `values`; numbers stay where there are no names."""
    place = {name: index for index, name in enumerate(values)}
    maps = [np.array([*(place[name] for name in own), NO_LABEL], np.int32) for own in names]
    mapped = [to[some] if own else some for some, own, to in zip(codes, names, maps, strict=True)]
    return np.concatenate([np.zeros(0, np.int32), *mapped])


def _declared_names(schema: Any, column: str) -> tuple[str, ...]:
    """Hugging Face's ClassLabel names in the schema's metadata, if they are there."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return ()
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return tuple(str(name) for name in found) if isinstance(found, list) else ()


@dataclass
class TarScan:
    """The images of one tar, one a sample."""

    names: list[bytes] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    """Byte where each image begins."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of each; -1 where the header before it is damaged, so that nobody knows."""
    labels: list[int] = field(default_factory=list)
    members: str = ""
    """Digest of name, size, time and place of each member, and of each label."""


def scan_tar(uri: str) -> TarScan:
    """Look through one tar's headers; samples are runs of members with the same key, as in WebDataset.

    A member whose header is damaged is taken for an image that cannot be read, unless its name still says otherwise. Of a
    remote tar contents are passed over where they are longer than what is fetched ahead, and read over where not: to ask
    again would take longer.

    Raises: UserError where it is no tar, is cut short, has .cls members that are no numbers below 2^31, or headers that claim
        more than 1 MiB for themselves.
    """
    scan = TarScan()
    with storage.open_read(uri) as file:
        try:
            scan.members = storage.digest(_scan_members(uri, cast(IO[bytes], _Bounded(uri, file)), scan))
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{uri} is not a whole tar of images and .cls numbers: {first_line(error)}") from error
    return scan


class _Bounded(io.RawIOBase):
    """A tar that is read in no larger pieces, and no further, than its size allows, whatever its headers claim."""

    def __init__(self, uri: str, file: IO[bytes]) -> None:
        self._uri, self._file = uri, file
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(min(position, self._size) if whence == io.SEEK_SET else position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """Raises: UserError where a header claims more than `_MAX_HEADER_BYTES` for itself: nothing else is read at once."""
        if not 0 <= size <= _MAX_HEADER_BYTES + TAR_BLOCK:
            at = self._file.tell() - TAR_BLOCK
            raise UserError(f"{self._uri}: the header at byte {at} claims {size:,} bytes of name; up to 1 MiB would be right")
        return self._file.read(size)


def _label_in(uri: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """The number in a .cls member; -1 for negative ones.

    Raises: UserError that names the member where it holds something else.
    """
    try:
        content = archive.extractfile(member)
    except KeyError:  # a link to a member that is not there
        content = None
    text = content.read(_MAX_CLS_BYTES + 1).strip() if content is not None else b""
    if len(text) > _MAX_CLS_BYTES or not re.fullmatch(rb"[+-]?[0-9]+", text) or int(text) > _MAX_LABEL:
        raise UserError(f"{uri}: {member.name} holds {text[:24]!r}; a number below 2^31 would be right")
    return max(int(text), NO_LABEL)


def _scan_members(uri: str, file: IO[bytes], scan: TarScan) -> Iterator[str]:
    """Fill in a scan. Yields what its digest is of."""
    previous, has_image, label = "", False, NO_LABEL
    for member, archive in _members(uri, file):
        key, extension = member_key(member.name)
        yield f"{member.name} {member.size} {member.mtime} {member.offset_data}"
        if key != previous:
            previous, has_image, label = key, False, NO_LABEL
        if archive is not None and extension == ".cls" and not member.isdir():
            label = _label_in(uri, archive, member)
            if has_image:
                scan.labels[-1] = label
            yield str(label)
        if not has_image and extension in IMAGE_EXTENSIONS and (archive is None or member.isfile()):
            has_image = True
            scan.names.append(member.name.encode("utf-8", "surrogateescape"))
            scan.at.append(member.offset_data)
            scan.sizes.append(member.size)
            scan.labels.append(label)


def _members(uri: str, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile | None]]:
    """Members with the archive that reads them, None for one whose header is damaged; reading goes on at the next good one.

    Raises: tarfile.TarError where there is no good header, or the file ends within a member.
    """
    start, damaged, good = 0, 0, 0
    while True:
        file.seek(start)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it has nothing to close but the file
        except tarfile.ReadError:
            if start:
                raise
            end = 0
        else:
            for member in archive:
                yield member, archive
                good += 1
            end = archive.offset
        file.seek(end)
        block = file.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK or not block.strip(b"\0"):
            return
        damaged += 1
        found = _next_header(file)
        if found is None and not good:
            raise tarfile.ReadError("no header of a member")
        log.warning("%s: the header at byte %d is damaged", uri, end)
        yield _nameless(block, end), None
        if found is None:
            return
        start = found


def _next_header(file: IO[bytes]) -> int | None:
    """Where the next header that is whole begins, or None."""
    while True:
        at = file.tell()
        block = file.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            return None
        if b"ustar" in block:
            try:
                tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
                return at
            except tarfile.HeaderError:
                continue


def _nameless(block: bytes, at: int) -> tarfile.TarInfo:
    """What is known of a member with a damaged header: its name, if that still reads as one."""
    name = block[:100].split(b"\0")[0]
    readable = bool(member_key(name.decode("latin-1"))[1]) and name.isascii() and name.decode().isprintable()
    member = tarfile.TarInfo(name.decode() if readable else f"header-at-byte-{at}.png")
    member.size, member.offset_data = -1, at + TAR_BLOCK
    return member


def member_key(name: str) -> tuple[str, str]:
    """WebDataset's sample key and extension: the name is cut at the first dot of its last part."""
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    return posixpath.join(folder, stem), (dot + extension).lower()
