"""A data set as units in canonical order.

A unit is a fixed run of consecutive images, up to 512 of them unless a Parquet row group is somewhat larger; an image's
position in the canonical order is its identity. The order: image folders by sorted path, Parquet by sorted file and row,
tars by sorted file and member.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.tables import NO_LABEL, Unit, UnitTable
from patchsae_ray.errors import UserError

UNIT_SIZE = 512
ROW_GROUP_CACHE_BYTES = 256 * 2**20
"""Of Parquet row groups that a process keeps, so that single images of a small data set need not be read in runs."""

Format = Literal["folder", "parquet", "tar"]


@dataclass(frozen=True)
class Reading:
    """How to read a unit's images."""

    format: Format
    image_column: str = "image"
    """Parquet: struct {bytes, path} or binary. Tars use the extension."""
    label_column: str | None = "label"
    """Parquet: integer or string labels; tars: `cls`; None where there are none."""
    label_values: tuple[str, ...] = ()
    """Parquet with string labels: the label is the position in these."""
    label_map: tuple[int, ...] = ()
    """Label of the source → position in the class list in use; empty where they are the same."""

    def mapped(self, labels: np.ndarray) -> np.ndarray:
        """Labels of the source (-1 without one) → those under the class list in use."""
        return np.array([*self.label_map, NO_LABEL], labels.dtype)[labels] if self.label_map else labels


@dataclass(frozen=True)
class Keeping:
    """Where a manifest that was just made is to be kept, once a run is about to begin."""

    folder: str
    note: str
    """File name of the note that leads from the source to it."""
    content: dict[str, Any] | None
    """Of the note, the manifest's name apart; None where a change of the source could go unseen."""


@dataclass(frozen=True)
class Manifest:
    """All units of a data set."""

    source: str
    units: UnitTable
    reading: Reading
    classnames: tuple[str, ...]
    """Empty where the source names no classes."""
    num_classes: int
    """0 where images have no labels."""
    digest: str
    """Of how the files are read and of their names, sizes, and Parquet footers or tar members with all labels; not of
    where they lie. An image file of a folder that is replaced by another of the same size is not noticed."""
    ignored_files: int = 0
    """Files in a folder that are no images by their extension."""
    labels_are_names: bool = False
    """Labels come from names (class folders, strings), numbered in sorted order."""
    encoded_bytes: int = 0
    """Of all images as they lie in their source: files, members, or the compressed image column."""
    largest_group: int = 0
    """Rows of the largest row group of Parquet; each piece of one of more than 1,024 reads the whole of it."""
    keeping: Keeping | None = None
    """None where it is kept already, or nowhere."""

    @property
    def num_images(self) -> int:
        return int(self.units.edges()[-1])

    @property
    def grain(self) -> Literal["image", "group"]:
        """What is best read by itself: an image, or, of Parquet whose images a process cannot keep, a row group."""
        small = self.encoded_bytes <= ROW_GROUP_CACHE_BYTES
        return "image" if self.reading.format != "parquet" or small else "group"

    @property
    def units_digest(self) -> str:
        """Digest of where the units begin: of what results by unit number depend on beside `digest`."""
        return storage.digest([np.ascontiguousarray(self.units.edges(), "<i8")])

    @property
    def cut(self) -> str:
        """What results by unit number depend on beside `digest`: empty where units are the 512 images that every version
        cut, else the digest of where they begin."""
        edges = self.units.edges()
        usual = self.reading.format != "parquet" or np.array_equal(edges, even_edges(self.num_images))
        return "" if usual else self.units_digest[:8]

    def group_edges(self) -> np.ndarray:
        """[groups + 1] int64: positions at which runs begin that are best read as a whole, and the number of images.

        Parquet's row groups, those of more than 1,024 rows in pieces of up to 512; of other sources the units.
        """
        return self.units.group_edges()

    def label_array(self) -> np.ndarray:
        """[num_images] int32: each image's label under the class list in use, -1 without one."""
        return self.reading.mapped(self.units.labels())

    @property
    def labelled(self) -> bool:
        return self.num_classes > 0

    def paths(self, unit: Unit) -> list[str]:
        """A name for each image of a unit: its path under the folder's root, Parquet file#row, or the tar's member."""
        return image_names(unit.images, self.reading)

    def with_classnames(self, classnames: Sequence[str]) -> "Manifest":
        """The same images under a given class list.

        Where labels come from names and the list has them all, a label is its name's position in the list. Otherwise
        positions count: as many names as classes, or at least as many where labels are numbers.

        Raises: UserError where the list does not fit.
        """
        place = {name: index for index, name in enumerate(classnames)}
        reading = self.reading
        if self.labels_are_names and all(name in place for name in self.classnames):
            reading = replace(reading, label_map=tuple(place[name] for name in self.classnames))
        elif len(classnames) < self.num_classes or (self.labels_are_names and len(classnames) != self.num_classes):
            raise UserError(f"--classnames has {len(classnames)} names, {self.source} has {self.num_classes} classes")
        return replace(self, reading=reading, classnames=tuple(classnames), num_classes=len(classnames))


def even_edges(count: int) -> np.ndarray:
    """Edges of units of 512 images; the last may be smaller."""
    return np.append(np.arange(0, count, UNIT_SIZE), count)


def file_edges(counts: Sequence[int]) -> np.ndarray:
    """Edges of units of 512 images that do not cross files."""
    starts = np.cumsum([0, *counts])
    pieces = [start + even_edges(count)[:-1] for start, count in zip(starts, counts, strict=False)]
    return np.concatenate([*pieces, starts[-1:]])


def row_group_edges(rows: np.ndarray) -> np.ndarray:
    """Edges of units of whole Parquet row groups.

    Neighbouring groups are put together up to 512 rows. A group of up to 1,024 is a unit by itself, so that none of it is
    read twice; a larger one is cut into equal pieces of up to 512.

    Args:
        rows: [groups] of each row group in order.
    """
    edges, end = [0], 0
    for count in rows.tolist():
        if end > edges[-1] and end + count - edges[-1] > UNIT_SIZE:
            edges.append(end)
        pieces = 1 if count <= 2 * UNIT_SIZE else -(-count // UNIT_SIZE)
        edges += [end + count * piece // pieces for piece in range(1, pieces)]
        end += count
        if count >= UNIT_SIZE:
            edges.append(end)
    return np.array(edges if edges[-1] == end else [*edges, end], np.int64)


def manifest_digest(reading: Reading, entries: Iterable[tuple[str, int, str]]) -> str:
    """Digest over (name, bytes, digest of what else is known) of each source file in order, and how they are read."""
    text = json.JSONEncoder().encode
    lines = (f"[{text(name)}, {size}, {text(more)}]" for name, size, more in entries)
    return storage.digest(chain([json.dumps(asdict(reading), sort_keys=True)], lines))


def image_names(images: pa.RecordBatch, reading: Reading) -> list[str]:
    """A name for each of some rows, as text though a path may be none."""
    if reading.format == "parquet":
        where = zip(images.column("uri").to_pylist(), images.column("at").to_pylist(), strict=True)
        return [f"{uri}#{row}" for uri, row in where]
    return [readable(name) for name in images.column("name").to_pylist()]


def readable(name: bytes) -> str:
    """A path's bytes as text, those that are no UTF-8 as \\xNN."""
    return name.decode("utf-8", "backslashreplace")
