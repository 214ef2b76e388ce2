"""Reading images, in units or one by one: their bytes and labels, decoded to one block of pixels."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.images import BadImage, decode
from patchsae_ray.data.manifest import Manifest, Reading, image_names
from patchsae_ray.data.parquet import known_footer, read_group
from patchsae_ray.data.tables import Unit
from patchsae_ray.errors import UserError

FILES_AT_ONCE = 64
GROUPS_AT_ONCE = 4
"""Parquet row groups that are read at once."""
GAP_BYTES = 64 * 2**10
"""Between a unit's members in a tar, read over rather than asked around."""
RANGE_BYTES = 8 * 2**20
"""Of neighbouring members of a tar, asked for at once."""


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
    images = unit.images.slice(first, count)
    positions = np.arange(images.num_rows) + unit.start + first
    return _decoded(_raws(images, reading, GAP_BYTES), positions, size, unit.index)


def decode_images(manifest: Manifest, positions: np.ndarray, size: int) -> DecodedUnit:
    """Read and decode single images to [n, size, size, 3], in the order given; unreadable ones are listed with the reason.

    Of folders and tars nothing else is read; of Parquet the row groups that hold them, which this process keeps up to
    ROW_GROUP_CACHE_BYTES. Several are on their way at once; threads may share the work.

    Args:
        manifest: of the data set.
        positions: of the images, in any order.
        size: side of the pixels.

    Returns: `positions` without the unreadable ones; index -1.

    Raises: IndexError where there is no such position; otherwise as `decode_unit`.
    """
    return _decoded(_raws(manifest.units.take(positions), manifest.reading, 0), positions, size, -1)


def _decoded(raws: Iterator[Raw], at: np.ndarray, size: int, index: int) -> DecodedUnit:
    pixels, positions, labels, bad = [], [], [], []
    seconds = {"read": 0.0, "decode": 0.0}
    mark = time.perf_counter()
    for position, raw in zip(at.tolist(), raws, strict=True):
        opened = time.perf_counter()
        seconds["read"] += opened - mark
        try:
            pixels.append(raw.decode(size))
            positions.append(position)
            labels.append(raw.label)
        except BadImage as error:
            bad.append((position, raw.path, str(error)))
        mark = time.perf_counter()
        seconds["decode"] += mark - opened
    block = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), dtype=np.uint8)
    return DecodedUnit(block, np.array(positions, np.int64), np.array(labels, np.int64), bad, seconds, index)


def read_unit(unit: Unit, reading: Reading) -> Iterator[Raw]:
    """A unit's images in order."""
    return _raws(unit.images, reading, GAP_BYTES)


def read_image(manifest: Manifest, position: int) -> Raw:
    """The image at a position, reading as little else as its source allows.

    Raises: IndexError where there is no such position.
    """
    return next(_raws(manifest.units.take(np.array([position])), manifest.reading, 0))


def _raws(images: pa.RecordBatch, reading: Reading, gap: int) -> Iterator[Raw]:
    """Images by their rows, in order; of tars what lies between two of them is read with them up to `gap` bytes."""
    labels = reading.mapped(images.column("label").to_numpy()).tolist()
    names = image_names(images, reading)
    if reading.format == "folder":
        contents = _from_folder(images)
    elif reading.format == "tar":
        contents = iter(_from_tars(images, gap))
    else:
        return iter(_from_parquet(images, reading, names, labels))
    return map(Raw, names, contents, labels)


def _from_folder(images: pa.RecordBatch) -> Iterator[bytes | UserError]:
    roots, names = images.column("uri").to_pylist(), images.column("name").to_pylist()
    for start in range(0, len(names), FILES_AT_ONCE):
        some = slice(start, start + FILES_AT_ONCE)
        yield from storage.read_many(
            [storage.join(root, os.fsdecode(name)) for root, name in zip(roots[some], names[some], strict=True)], roots[some]
        )


def _from_tars(images: pa.RecordBatch, gap: int) -> list[bytes | UserError]:
    """Members by the bytes where they lie; neighbours in few ranges."""
    members = list(
        zip(*(images.column(name).to_pylist() for name in ("uri", "at", "size")), range(images.num_rows), strict=True)
    )
    found: list[bytes | UserError] = [UserError("the header before it in the tar is damaged")] * len(members)
    whole = sorted(member for member in members if member[2] >= 0)
    ranges: list[tuple[str, int, int]] = []
    place: list[int] = []
    for uri, at, size, _ in whole:
        if ranges and ranges[-1][0] == uri and at - ranges[-1][2] <= gap and at + size - ranges[-1][1] <= RANGE_BYTES:
            ranges[-1] = (uri, ranges[-1][1], max(ranges[-1][2], at + size))
        else:
            ranges.append((uri, at, at + size))
        place.append(len(ranges) - 1)
    contents = storage.read_ranges(ranges)
    for (_, at, size, index), number in zip(whole, place, strict=True):
        begin = at - ranges[number][1]
        found[index] = contents[number][begin : begin + size]
    return found


def _from_parquet(images: pa.RecordBatch, reading: Reading, names: list[str], labels: list[int]) -> list[Raw]:
    """Rows by the row groups that hold them, each read once."""
    wanted: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for index, (uri, row, size) in enumerate(
        zip(*(images.column(name).to_pylist() for name in ("uri", "at", "size")), strict=True)
    ):
        starts = known_footer(uri, size).starts
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if group == len(starts) - 1:
            raise UserError(f"{uri} changed since it was listed: it has no row {row}; --relist lists it anew")
        wanted.setdefault((uri, size, group), []).append((index, row - int(starts[group])))
    raws: list[Raw] = [Raw("", b"", 0)] * len(names)

    def read(one: tuple[tuple[str, int, int], list[tuple[int, int]]]) -> None:
        (uri, size, group), rows = one
        footer = known_footer(uri, size)
        found = read_group(footer, group, reading.image_column, keep=len(rows) < footer.metadata.row_group(group).num_rows)
        for index, row in rows:
            if row >= len(found.images):
                raws[index] = Raw(names[index], UserError(f"damaged row group: {found.reason}"), labels[index])
                continue
            image = found.images[row].as_py()
            path, data = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (None, image)
            raws[index] = Raw(path or names[index], data or b"", labels[index])

    with ThreadPoolExecutor(GROUPS_AT_ONCE) as pool:
        list(pool.map(read, wanted.items()))
    return raws
