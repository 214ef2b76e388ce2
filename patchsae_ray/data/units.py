"""Reading a unit: its images' bytes and labels, decoded to one block of pixels."""

import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow.parquet as pq

from patchsae_ray import storage
from patchsae_ray.data.images import BadImage, decode
from patchsae_ray.data.manifest import NO_LABEL, Manifest, Reading, Segment, Unit
from patchsae_ray.data.scans import IMAGE_EXTENSIONS, member_key
from patchsae_ray.errors import UserError

_ROWS_AT_ONCE = 64
_FILES_AT_ONCE = 64


@dataclass(frozen=True)
class Raw:
    """One image as it lies in its source."""

    path: str
    data: bytes | UserError
    """Its bytes, or why there are none."""
    label: int

    def decode(self, size: int) -> np.ndarray:
        """Its pixels [size, size, 3].

        Raises: BadImage with the reason.
        """
        if isinstance(self.data, UserError):
            raise BadImage(str(self.data))
        return decode(self.data, size)


@dataclass
class DecodedUnit:
    """A unit's readable images; n of them."""

    pixels: np.ndarray
    """[n, size, size, 3] uint8."""
    positions: np.ndarray
    """[n] int64."""
    labels: np.ndarray
    """[n] int64, -1 without one."""
    bad: list[tuple[int, str, str]]
    """(position, path, reason) of each image that could not be read."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage times: read, decode."""
    index: int = -1
    """Of the unit in the data set."""


def decode_unit(unit: Unit, reading: Reading, size: int, first: int = 0, count: int | None = None) -> DecodedUnit:
    """Read and decode a unit's images to [n, size, size, 3]; unreadable ones are listed with the reason.

    Args:
        unit: the unit.
        reading: how its files are read.
        size: side of the pixels.
        first: of the unit's images to decode.
        count: images to decode; default: all from `first` on.

    Raises: StoreError where the store does not answer; UserError where a file is not what it was.
    """
    pixels, positions, labels, bad = [], [], [], []
    seconds = {"read": 0.0, "decode": 0.0}
    part, passed_over = part_of(unit, reading, first, unit.count - first if count is None else count)
    position = part.start
    mark = time.perf_counter()
    for raw in islice(read_unit(part, reading), passed_over, None):
        opened = time.perf_counter()
        seconds["read"] += opened - mark
        try:
            pixels.append(raw.decode(size))
            positions.append(position)
            labels.append(raw.label)
        except BadImage as error:
            bad.append((position, raw.path, str(error)))
        position += 1
        mark = time.perf_counter()
        seconds["decode"] += mark - opened
    read, wanted = position - part.start, part.count - passed_over
    if read != wanted:
        raise UserError(f"{unit.segments[0].uri} changed while it was read: {read} images, expected {wanted}")
    block = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), dtype=np.uint8)
    return DecodedUnit(block, np.array(positions, np.int64), np.array(labels, np.int64), bad, seconds, unit.index)


def decode_images(manifest: Manifest, positions: np.ndarray, size: int) -> DecodedUnit:
    """Images at any positions, decoded; the result is in the order given."""
    pixels, kept, labels, bad = [], [], [], []
    for position in positions.tolist():
        raw = read_image(manifest, position)
        try:
            pixels.append(raw.decode(size))
            kept.append(position)
            labels.append(raw.label)
        except BadImage as error:
            bad.append((position, raw.path, str(error)))
    block = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), dtype=np.uint8)
    return DecodedUnit(block, np.array(kept, np.int64), np.array(labels, np.int64), bad)


def part_of(unit: Unit, reading: Reading, first: int, count: int) -> tuple[Unit, int]:
    """A run of a unit's images as a unit that begins at the first of them, and how many images to pass over before it.

    None in folders and Parquet; a tar is read from where the unit's part of it begins.
    """
    segments: list[Segment] = []
    passed_over, start = 0, 0
    for segment in unit.segments:
        low, high = max(0, first - start), min(segment.count, first + count - start)
        start += segment.count
        if low >= high:
            continue
        if reading.format == "tar":
            segments.append(replace(segment, count=high))
            passed_over += low
        elif reading.format == "folder":
            segments.append(replace(segment, count=high - low, names=segment.names[low:high], labels=segment.labels[low:high]))
        else:
            segments.append(replace(segment, count=high - low, first=segment.first + low))
    return Unit(unit.index, unit.start + first, tuple(segments)), passed_over


def read_unit(unit: Unit, reading: Reading) -> Iterator[Raw]:
    """A unit's images in order."""
    readers = {"folder": _read_folder, "parquet": _read_parquet, "tar": _read_tar}
    for segment in unit.segments:
        for raw in readers[reading.format](segment, reading):
            mapped = reading.label_map and raw.label >= 0
            yield replace(raw, label=reading.label_map[raw.label]) if mapped else raw


def read_image(manifest: Manifest, position: int) -> Raw:
    """The image at a position, reading as little else as its source allows.

    Raises: IndexError where there is no such position.
    """
    unit = manifest.units[manifest.units.at(position)]
    part, _ = part_of(unit, manifest.reading, position - unit.start, 1)
    return list(read_unit(part, manifest.reading))[-1]


def _read_folder(segment: Segment, reading: Reading) -> Iterator[Raw]:
    for start in range(0, segment.count, _FILES_AT_ONCE):
        names = segment.names[start : start + _FILES_AT_ONCE]
        contents = storage.read_many([storage.join(segment.uri, name) for name in names])
        yield from map(Raw, names, contents, segment.labels[start : start + _FILES_AT_ONCE])


def _read_parquet(segment: Segment, reading: Reading) -> Iterator[Raw]:
    columns = [reading.image_column, *([reading.label_column] if reading.label_column else [])]
    label_of = {value: label for label, value in enumerate(reading.label_values)}
    with storage.open_read(segment.uri) as opened, storage.reaching(segment.uri):
        file = pq.ParquetFile(opened)
        groups, skip = _row_groups(file, segment)
        row = segment.first - skip
        end = segment.first + segment.count
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
            if row + batch.num_rows > segment.first and row < end:
                low, high = max(0, segment.first - row), min(batch.num_rows, end - row)
                for index, record in enumerate(batch.slice(low, high - low).to_pylist()):
                    image = record[reading.image_column]
                    path, data = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (None, image)
                    label = record[reading.label_column] if reading.label_column else NO_LABEL
                    label = label_of.get(str(label), NO_LABEL) if label_of and label is not None else label
                    name = path or f"{segment.uri}#{row + low + index}"
                    yield Raw(name, data or b"", NO_LABEL if label is None else int(label))
            row += batch.num_rows
            if row >= end:
                return


def _row_groups(file: "pq.ParquetFile", segment: Segment) -> tuple[list[int], int]:
    """The row groups that hold a segment, and how many of their rows come before it."""
    groups: list[int] = []
    row, skip = 0, 0
    for index in range(file.num_row_groups):
        rows = file.metadata.row_group(index).num_rows
        if row < segment.first + segment.count and row + rows > segment.first:
            if not groups:
                skip = segment.first - row
            groups.append(index)
        row += rows
    return groups, skip


def _read_tar(segment: Segment, reading: Reading) -> Iterator[Raw]:
    """Samples from a byte offset on; members of one sample lie side by side, as in WebDataset."""
    with storage.open_read(segment.uri) as opened, storage.reaching(segment.uri):
        opened.seek(segment.first)
        found = 0
        with tarfile.open(fileobj=opened, mode="r|") as archive:
            key, path, data, label = "", "", None, NO_LABEL
            for member in archive:
                member_of, extension = member_key(member.name)
                if member_of != key:
                    if data is not None:
                        yield Raw(path, data, label)
                        found += 1
                        if found == segment.count:
                            return
                    key, data, label = member_of, None, NO_LABEL
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if extension in IMAGE_EXTENSIONS and data is None:
                    path, data = member.name, content.read()
                elif extension == ".cls":
                    label = int(content.read())
            if data is not None:
                yield Raw(path, data, label)
