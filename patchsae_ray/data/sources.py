"""What lies under a URI → a manifest: image folders, Parquet files, WebDataset tars."""

import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

from patchsae_ray import storage
from patchsae_ray.data.manifest import (
    NO_LABEL,
    UNIT_SIZE,
    Format,
    Manifest,
    Reading,
    Segment,
    Unit,
    UnitTable,
    cut_units,
    manifest_digest,
)
from patchsae_ray.data.scans import IMAGE_EXTENSIONS, Labels, scan_parquet, scan_tar
from patchsae_ray.errors import UserError, nearest

SCANNING_THREADS = 16
"""Parquet files or tars that are looked through at once."""

Files = list[storage.Entry]

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where a data set lies, and which part and columns of it are meant."""

    uri: str
    """A local path or fsspec URI; may hold `*`."""
    split: str | None = None
    """A sub-folder of that name, or files named `split-…` or `split.…`."""
    image_column: str = "image"
    """Parquet's image column."""
    label_column: str = "label"
    """Parquet's label column; where there is none the images have no labels."""


@dataclass(frozen=True)
class Listing:
    """The files of a source."""

    root: str
    files: Files
    format: Format


def build_manifest(uri: str, split: str | None = None, image_column: str = "image", label_column: str = "label") -> Manifest:
    """The manifest of a folder, a glob, or a single Parquet or tar file: `Source`'s fields.

    Raises: UserError where nothing is there, or nothing that can be read.
    """
    source = Source(storage.absolute(uri), split, image_column, label_column)
    return manifest_of(source, list_source(source))


def list_source(source: Source) -> Listing:
    """List a source's files.

    Raises: UserError where nothing is there, or nothing that can be read.
    """
    root, files = _list(source.uri)
    if source.split:
        root, files = _select_split(source.uri, root, files, source.split)
    found = _format_of(files)
    if found is None:
        raise UserError(f"no images in {source.uri}: expected image files, .parquet or .tar")
    return Listing(root, files, found)


def manifest_of(source: Source, listing: Listing) -> Manifest:
    """Cut a listing into units, looking into Parquet files and tars.

    Raises: UserError where a file is not what its name says.
    """
    if listing.format == "parquet":
        return _parquet_manifest(source, listing)
    make = _folder_manifest if listing.format == "folder" else _tar_manifest
    return make(source.uri, listing.root, listing.files)


def _list(uri: str) -> tuple[str, Files]:
    if "*" in uri:
        return storage.glob_files(uri)
    found = storage.info(uri)
    if found is None:
        raise UserError(f"no such data set: {uri} is not there")
    if found["type"] == "directory":
        return uri, storage.entries(uri)
    return posixpath.dirname(uri), [storage.entry_of(posixpath.basename(uri), found)]


def _in_parallel(work: Callable[[storage.Entry], T], files: Sequence[storage.Entry]) -> list[T]:
    with ThreadPoolExecutor(SCANNING_THREADS) as pool:
        return list(pool.map(work, files))


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _format_of(files: Files) -> Format | None:
    extensions = {_extension(file.path) for file in files if not _hidden(file.path)}
    if ".parquet" in extensions:
        return "parquet"
    if ".tar" in extensions:
        return "tar"
    return "folder" if extensions & IMAGE_EXTENSIONS else None


def _select_split(uri: str, root: str, files: Files, split: str) -> tuple[str, Files]:
    inside = [replace(file, path=file.path.removeprefix(f"{split}/")) for file in files if file.path.startswith(f"{split}/")]
    if inside:
        return storage.join(root, split), inside
    named = [file for file in files if posixpath.basename(file.path).startswith((f"{split}-", f"{split}.", f"{split}_"))]
    if named:
        return root, named
    folders = {file.path.split("/")[0] for file in files if "/" in file.path}
    stems = {posixpath.basename(file.path).split("-")[0].split(".")[0] for file in files}
    there = sorted(folders or stems)
    raise UserError(f"--split {split}: not in {uri}, which has {', '.join(there[:8])}{nearest(split, there)}")


def _folder_manifest(uri: str, root: str, files: Files) -> Manifest:
    images = [file for file in files if _extension(file.path) in IMAGE_EXTENSIONS and not _hidden(file.path)]
    flat = [file.path for file in images if "/" not in file.path]
    classes = sorted({file.path.split("/")[0] for file in images if "/" in file.path})
    if flat and classes:
        raise UserError(f"{uri} has images beside class folders ({flat[0]}): expected one or the other")
    number = {name: label for label, name in enumerate(classes)}
    names = tuple(file.path for file in images)
    labels = tuple(number.get(path.split("/")[0], NO_LABEL) if "/" in path else NO_LABEL for path in names)
    reading = Reading("folder")
    segment = Segment(root, len(names), names=names, labels=labels)
    # `first` counts bytes or rows of a file, which a folder has not: it stays 0 so that equal units are equal.
    units = UnitTable.of(Unit(u.index, u.start, tuple(_at_zero(s) for s in u.segments)) for u in cut_units([segment]))
    entries = [(file.path, file.size, "") for file in images]
    ignored = sum(not _hidden(file.path) for file in files) - len(images)
    return Manifest(uri, units, reading, tuple(classes), len(classes), manifest_digest(reading, entries), ignored, True)


def _at_zero(segment: Segment) -> Segment:
    return Segment(segment.uri, segment.count, 0, segment.names, segment.labels)


def _parquet_manifest(source: Source, listing: Listing) -> Manifest:
    files = [file for file in listing.files if _extension(file.path) == ".parquet" and not _hidden(file.path)]
    columns = (source.image_column, source.label_column)
    scans = _in_parallel(lambda file: scan_parquet(storage.join(listing.root, file.path), file.size, *columns), files)
    labels = Labels(scans, source.label_column)
    units = cut_units([Segment(scan.uri, scan.rows) for scan in scans if scan.rows])
    if not units:
        raise UserError(f"no images in {source.uri}: its Parquet files have no rows")
    entries = [(file.path, file.size, scan.footer) for file, scan in zip(files, scans, strict=True)]
    reading = Reading("parquet", source.image_column, source.label_column if labels.there else None, labels.values)
    digest = manifest_digest(reading, [*entries, ("labels", 0, storage.digest([scan.labels for scan in scans if scan.there]))])
    return Manifest(
        source.uri, UnitTable.of(units), reading, labels.classnames, labels.num_classes, digest,
        labels_are_names=bool(labels.values),
    )  # fmt: skip


def _tar_manifest(uri: str, root: str, files: Files) -> Manifest:
    tars = [file for file in files if _extension(file.path) == ".tar" and not _hidden(file.path)]
    scans = _in_parallel(lambda file: scan_tar(storage.join(root, file.path)), tars)
    highest = max((scan.highest for scan in scans), default=NO_LABEL)
    segments: list[Segment] = []
    for file, scan in zip(tars, scans, strict=True):
        for start in range(0, len(scan.offsets), UNIT_SIZE):
            count = min(UNIT_SIZE, len(scan.offsets) - start)
            segments.append(Segment(storage.join(root, file.path), count, scan.offsets[start]))
    entries = [(file.path, file.size, storage.digest(scan.members)) for file, scan in zip(tars, scans, strict=True)]
    # A tar's unit begins at a member and does not cross files: a byte offset is all that is kept of its index.
    starts = accumulate((segment.count for segment in segments), initial=0)
    units = UnitTable.of(
        Unit(index, start, (segment,)) for index, (start, segment) in enumerate(zip(starts, segments, strict=False))
    )
    if not segments:
        raise UserError(f"no images in {uri}: its tars have none")
    labelled = highest >= 0
    names = _tar_classnames(root, files) if labelled else ()
    reading = Reading("tar", label_column="cls" if labelled else None)
    return Manifest(uri, units, reading, names, max(len(names), highest + 1), manifest_digest(reading, entries))


def _tar_classnames(root: str, files: Files) -> tuple[str, ...]:
    """classnames.txt beside the tars or one folder up, one name a line."""
    for uri in (
        storage.join(root, "classnames.txt"),
        storage.join(posixpath.dirname(root.rstrip("/")) or ".", "classnames.txt"),
    ):
        if storage.exists(uri):
            return tuple(line.strip() for line in storage.read_text(uri).splitlines() if line.strip())
    return ()
