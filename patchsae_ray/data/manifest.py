"""A data set as units in canonical order.

A unit is a fixed run of up to 512 consecutive images; an image's position in the canonical order is its identity. The
order: image folders by sorted path, Parquet by sorted file and row, tars by sorted file and member.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from patchsae_ray import storage
from patchsae_ray.errors import UserError

UNIT_SIZE = 512
NO_LABEL = -1

Format = Literal["folder", "parquet", "tar"]


@dataclass(frozen=True)
class Segment:
    """Consecutive images of one file, or the named files of a folder."""

    uri: str
    """The Parquet file, the tar, or the root of the folder."""
    count: int
    first: int = 0
    """Parquet: first row. Tar: byte where the first member's header begins."""
    names: tuple[str, ...] = ()
    """Folder: paths under the root, one an image."""
    labels: tuple[int, ...] = ()
    """Folder: label of each."""


@dataclass(frozen=True)
class Unit:
    """Up to 512 consecutive images, the grain of work."""

    index: int
    start: int
    """Position of the first image in the canonical order."""
    segments: tuple[Segment, ...]

    @property
    def count(self) -> int:
        return sum(segment.count for segment in self.segments)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        fields = json.loads(text)
        segments = tuple(
            Segment(**{**segment, "names": tuple(segment["names"]), "labels": tuple(segment["labels"])})
            for segment in fields["segments"]
        )
        return cls(fields["index"], fields["start"], segments)


@dataclass(frozen=True)
class Reading:
    """How to read a unit's images."""

    format: Format
    image_column: str = "image"
    """Parquet: struct {bytes, path} or binary. Tars use the extension."""
    label_column: str | None = "label"
    """Parquet: integer or string labels; None where there are none."""
    label_values: tuple[str, ...] = ()
    """Parquet with string labels: the label is the position in these."""
    label_map: tuple[int, ...] = ()
    """Label of the source → position in the class list in use; empty where they are the same."""


@dataclass(frozen=True)
class Manifest:
    """All units of a data set."""

    source: str
    units: tuple[Unit, ...]
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

    @property
    def num_images(self) -> int:
        return sum(unit.count for unit in self.units)

    @property
    def labelled(self) -> bool:
        return self.num_classes > 0

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


def cut_units(segments: Sequence[Segment]) -> tuple[Unit, ...]:
    """Segments of any length → units of 512 images, in order."""
    units: list[Unit] = []
    current: list[Segment] = []
    start = filled = 0
    for segment in segments:
        for piece in _pieces(segment, filled):
            current.append(piece)
            filled += piece.count
            if filled == UNIT_SIZE:
                units.append(Unit(len(units), start, tuple(current)))
                start, filled, current = start + filled, 0, []
    if current:
        units.append(Unit(len(units), start, tuple(current)))
    return tuple(units)


def _pieces(segment: Segment, filled: int) -> Iterator[Segment]:
    done = 0
    while done < segment.count:
        count = min(segment.count - done, UNIT_SIZE - filled)
        names, labels = segment.names[done : done + count], segment.labels[done : done + count]
        yield replace(segment, first=segment.first + done, count=count, names=names, labels=labels)
        done, filled = done + count, (filled + count) % UNIT_SIZE


def manifest_digest(reading: Reading, entries: Sequence[tuple[str, int, str]]) -> str:
    """Digest over (name, bytes, digest of what else is known) of each source file and how they are read."""
    return storage.digest([json.dumps(asdict(reading), sort_keys=True), *(json.dumps(entry) for entry in entries)])
