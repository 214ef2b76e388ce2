"""A data set as units in canonical order.

A unit is a fixed run of up to 512 consecutive images; an image's position in the canonical order is its identity. The
order: image folders by sorted path, Parquet by sorted file and row, tars by sorted file and member.
"""

import bisect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa

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


_SEGMENT = pa.struct(
    [
        ("uri", pa.string()),
        ("count", pa.int64()),
        ("first", pa.int64()),
        ("names", pa.list_(pa.string())),
        ("labels", pa.list_(pa.int64())),
    ]
)
UNIT_SCHEMA = pa.schema([("start", pa.int64()), ("count", pa.int64()), ("segments", pa.list_(_SEGMENT))])
"""A unit as a row of Arrow, in memory and in a kept manifest."""
UNITS_A_BATCH = 64

Batches = Callable[[int], pa.RecordBatch]


class UnitTable(Sequence[Unit]):
    """All units of a data set, as Arrow batches of 64: in memory, or in a kept manifest's file, read as they are wanted.

    Args:
        batches: in memory.
        uri: of an Arrow file; used where `batches` is None.
    """

    def __init__(self, batches: tuple[pa.RecordBatch, ...] | None, uri: str | None = None) -> None:
        self._batches, self._uri = batches, uri
        self._starts: np.ndarray | None = None

    @classmethod
    def of(cls, units: Iterable[Unit]) -> "UnitTable":
        """A table in memory."""
        rows = [{"start": unit.start, "count": unit.count, "segments": [asdict(s) for s in unit.segments]} for unit in units]
        parts = [rows[index : index + UNITS_A_BATCH] for index in range(0, len(rows), UNITS_A_BATCH)]
        return cls(tuple(pa.RecordBatch.from_pylist(part, schema=UNIT_SCHEMA) for part in parts))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The batches in order."""
        if self._batches is not None:
            yield from self._batches
        else:
            reader = _open_arrow(self._uri or "")
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)

    def in_memory(self) -> "UnitTable":
        """The same table without its file, for machines that do not have it."""
        return UnitTable(tuple(self.batches()))

    def edges(self) -> np.ndarray:
        """[units + 1] int64: position of each unit's first image, and the number of images at the end."""
        if self._starts is None:
            starts = [batch.column("start").to_numpy() for batch in self.batches()]
            counts = [batch.column("count").to_numpy() for batch in self.batches()]
            end = int(starts[-1][-1] + counts[-1][-1]) if starts else 0
            self._starts = np.concatenate([*starts, np.array([end])]) if starts else np.zeros(1, np.int64)
        return self._starts

    def at(self, position: int) -> int:
        """Index of the unit that holds an image.

        Raises: IndexError where there is no such position.
        """
        edges = self.edges()
        if not 0 <= position < edges[-1]:
            raise IndexError(position)
        return bisect.bisect_right(edges, position) - 1

    def __len__(self) -> int:
        return len(self.edges()) - 1

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self.read(range(len(self))[index])

    def read(self, index: int) -> Unit:
        """Unit `index`, without looking at the others: what a worker does with a kept manifest."""
        number, row = divmod(index, UNITS_A_BATCH)
        batch = self._batches[number] if self._batches is not None else _kept_batch(self._uri or "", number)
        found = batch.slice(row, 1).to_pylist()[0]
        segments = (
            Segment(one["uri"], one["count"], one["first"], tuple(one["names"]), tuple(one["labels"]))
            for one in found["segments"]
        )
        return Unit(index, found["start"], tuple(segments))

    def __getstate__(self) -> dict[str, Any]:
        return {"_batches": self._batches, "_uri": self._uri, "_starts": None}  # workers want a few units, not all starts


@lru_cache(maxsize=4)
def _open_arrow(uri: str) -> Any:
    return pa.ipc.open_file(storage.open_read(uri))


@lru_cache(maxsize=8)
def _kept_batch(uri: str, number: int) -> pa.RecordBatch:
    with storage.reaching(uri):
        return _open_arrow(uri).get_batch(number)


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
    keeping: Keeping | None = None
    """None where it is kept already, or nowhere."""

    @property
    def num_images(self) -> int:
        return int(self.units.edges()[-1])

    @property
    def labelled(self) -> bool:
        return self.num_classes > 0

    @property
    def grain(self) -> Literal["image", "group"]:
        """image where single images can be read by themselves, group where only whole row groups can."""
        return "image"

    def group_edges(self) -> np.ndarray:
        """[groups + 1] position of each row group's first image, and the number of images at the end."""
        return self.units.edges()

    def label_array(self) -> np.ndarray:
        """[num_images] int32, -1 without one."""
        found = [label for unit in self.units for segment in unit.segments for label in segment.labels]
        return np.array(found or [NO_LABEL] * self.num_images, np.int32)

    def paths(self, unit: Unit) -> list[str]:
        """A name for each image of a unit: its path under the folder's root, Parquet file#row, or the tar that holds it."""
        by_format: dict[Format, Callable[[Segment], Sequence[str]]] = {
            "folder": lambda segment: segment.names,
            "parquet": lambda segment: [f"{segment.uri}#{segment.first + row}" for row in range(segment.count)],
            "tar": lambda segment: [segment.uri] * segment.count,
        }
        return [path for segment in unit.segments for path in by_format[self.reading.format](segment)]

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
