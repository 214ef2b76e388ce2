"""Looking into one Parquet file or tar: what it holds, pixels apart."""

import json
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from patchsae_ray import storage
from patchsae_ray.data.manifest import NO_LABEL
from patchsae_ray.errors import UserError, first_line

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass
class ParquetScan:
    """What one Parquet file holds, pixels apart."""

    uri: str
    rows: int
    footer: str
    """Digest of the footer."""
    there: bool
    """Whether it has the label column."""
    labels: str = ""
    """Digest of all labels."""
    values: frozenset[str] = frozenset()
    """Distinct string labels."""
    declared: tuple[str, ...] = ()
    """Class names that the schema's metadata declare."""
    highest: int = NO_LABEL


def scan_parquet(uri: str, size: int, image_column: str, label_column: str) -> ParquetScan:
    """Look through one file.

    Raises: UserError where it is damaged, has no images, or labels of a kind that are none.
    """
    with storage.open_read(uri) as opened:
        try:
            file = pq.ParquetFile(opened)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{uri} is not a whole Parquet file: {first_line(error)}") from error
        schema = file.schema_arrow
        if image_column not in schema.names:
            raise UserError(f"{uri} has no column {image_column!r}; it has {', '.join(schema.names)}")
        footer = storage.digest([_footer(opened, size)])
        scan = ParquetScan(uri, file.metadata.num_rows, footer, label_column in schema.names)
        if scan.there:
            scan.declared = _declared_names(schema, label_column)
            _scan_labels(scan, file.read(columns=[label_column])[label_column], label_column)
        return scan


def _scan_labels(scan: ParquetScan, column: Any, name: str) -> None:
    kind = column.type
    if pa.types.is_integer(kind):
        labels = column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
        scan.highest = int(labels.max(initial=NO_LABEL))
        scan.labels = storage.digest([labels.tobytes()])
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        strings = [str(value) for value in column.to_pylist() if value is not None]
        scan.values = frozenset(strings)
        scan.labels = storage.digest(strings)
    else:
        raise UserError(f"{scan.uri}: label column {name!r} is {kind}; integers or strings would be right")


def _footer(opened: IO[bytes], size: int) -> bytes:
    """A Parquet file's footer: where each column's pages lie, how large they are, their statistics."""
    opened.seek(size - 8)
    length = int.from_bytes(opened.read(4), "little")
    opened.seek(size - 8 - length)
    return opened.read(length)


class Labels:
    """The labels of all files of a Parquet data set.

    Raises: UserError where some files have them and others have not.
    """

    def __init__(self, scans: Sequence[ParquetScan], column: str) -> None:
        self.there = bool(scans) and scans[0].there
        for scan in scans:
            if scan.there != self.there:
                raise UserError(f"{scan.uri} has {'a' if scan.there else 'no'} column {column!r}, other files of it differ")
        self.values = tuple(sorted(frozenset[str]().union(*(scan.values for scan in scans))))
        declared = next((scan.declared for scan in scans if scan.declared), ())
        self.classnames = (self.values or declared) if self.there else ()
        highest = max((scan.highest for scan in scans), default=NO_LABEL)
        self.num_classes = max(len(self.classnames), highest + 1) if self.there else 0


def _declared_names(schema: Any, column: str) -> tuple[str, ...]:
    """Hugging Face's ClassLabel names in the schema's metadata, if they are there."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except ValueError:
        return ()
    names = (features.get(column) or {}).get("names") or ()
    return tuple(str(name) for name in names)


@dataclass
class TarScan:
    offsets: list[int] = field(default_factory=list)
    """Byte where the first member of each image sample begins."""
    members: list[str] = field(default_factory=list)
    """Name, size, time and place of each member, and each label."""
    highest: int = NO_LABEL


def scan_tar(uri: str) -> TarScan:
    scan = TarScan()
    with storage.open_read(uri) as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r:") as archive:
                sample_start, previous, has_image = 0, "", False
                for member in archive:
                    key, extension = member_key(member.name)
                    scan.members.append(f"{member.name} {member.size} {member.mtime} {member.offset_data}")
                    if key != previous:
                        sample_start, previous, has_image = member.offset, key, False
                    if extension in IMAGE_EXTENSIONS and not has_image:
                        scan.offsets.append(sample_start)
                        has_image = True
                    if extension == ".cls":
                        content = archive.extractfile(member)
                        label = int(content.read()) if content else NO_LABEL
                        scan.highest = max(scan.highest, label)
                        scan.members.append(str(label))
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{uri} is not a whole tar of images and .cls numbers: {first_line(error)}") from error
    return scan


def member_key(name: str) -> tuple[str, str]:
    """WebDataset's sample key and extension: the name is cut at the first dot of its last part."""
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    return posixpath.join(folder, stem), (dot + extension).lower()
