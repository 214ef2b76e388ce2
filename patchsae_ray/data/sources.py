"""What lies under a URI → a manifest: image folders, Parquet files, WebDataset tars."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.folders import FolderShare, branches_share, file_entries, share_of
from patchsae_ray.data.listing import (
    Listed,
    branches,
    extension_of,
    joined,
    list_branch,
    of_entries,
)
from patchsae_ray.data.making import IN_THIS_PROCESS, Making, on_threads, parts_of
from patchsae_ray.data.manifest import (
    Format,
    Manifest,
    Reading,
    even_edges,
    file_edges,
    manifest_digest,
    readable,
    row_group_edges,
)
from patchsae_ray.data.scans import Labels, ParquetScan, numbered, scan_parquet, scan_tar
from patchsae_ray.data.tables import Part, UnitTable, rows_of
from patchsae_ray.errors import UserError, nearest

SHARES = 256
"""Pieces, at most, that the making of a manifest is cut into."""

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
    format: Format
    archives: tuple[storage.Entry, ...]
    """Parquet files or tars."""
    shares: tuple[FolderShare, ...] = ()
    """Of a folder of images."""
    ignored: int = 0
    """Other files of it."""
    directories: dict[str, int] | None = None
    """Of a local folder: directory → time of its last change in ns, before it was read."""


def build_manifest(
    uri: str,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    making: Making = IN_THIS_PROCESS,
) -> Manifest:
    """The manifest of a folder, a glob, or a single Parquet or tar file: `Source`'s fields.

    Raises: UserError where nothing is there, or nothing that can be read.
    """
    source = Source(storage.absolute(uri), split, image_column, label_column)
    return manifest_of(source, list_source(source, making), making)


def list_source(source: Source, making: Making = IN_THIS_PROCESS) -> Listing:
    """List a source's files.

    Raises: UserError where nothing is there, or nothing that can be read.
    """
    if "*" in source.uri:
        return _listing_of(source, *_selected(source, *storage.glob_files(source.uri)))
    found = storage.info(source.uri)
    if found is None:
        raise UserError(f"no such data set: {source.uri} is not there")
    if found["type"] != "directory":
        entry = storage.entry_of(posixpath.basename(source.uri), found)
        return _listing_of(source, *_selected(source, posixpath.dirname(source.uri), [entry]))
    return _list_folder(source, making)


def _selected(source: Source, root: str, files: list[storage.Entry]) -> tuple[str, list[storage.Entry]]:
    """The files of a split; all of them where none is asked for."""
    split = source.split
    if not split:
        return root, files
    inside = [replace(file, path=file.path.removeprefix(f"{split}/")) for file in files if file.path.startswith(f"{split}/")]
    if inside:
        return storage.join(root, split), inside
    named = [file for file in files if posixpath.basename(file.path).startswith(_prefixes(split))]
    if not named:
        raise _no_split(source, [file.path for file in files])
    return root, named


def _prefixes(split: str) -> tuple[str, ...]:
    return f"{split}-", f"{split}.", f"{split}_"


def _no_split(source: Source, paths: Sequence[str]) -> UserError:
    split = source.split or ""
    folders = {path.split("/")[0] for path in paths if "/" in path}
    stems = {posixpath.basename(path).split("-")[0].split(".")[0] for path in paths}
    there = sorted(folders or stems)
    return UserError(f"--split {split}: not in {source.uri}, which has {', '.join(there[:8])}{nearest(split, there)}")


def _list_folder(source: Source, making: Making) -> Listing:
    root, prefixes = source.uri, tuple[str, ...]()
    if source.split:
        inside = storage.join(root, source.split)
        root, prefixes = (inside, prefixes) if storage.is_directory(inside) else (root, _prefixes(source.split))
    found = branches(root, prefixes)
    deep = [branch for branch in found if branch.deep]
    top = joined(on_threads(list_branch, [branch for branch in found if not branch.deep]))
    if top.images.num_rows or not deep:  # files beside folders belong between them
        top = joined([top, *on_threads(list_branch, deep)])
        listing = _listing(source, root, [top], [share_of(top.images, root, None)])
    else:
        work = partial(branches_share, root=root)
        shares, others = zip(*making.run(work, _cut(deep)), strict=True)
        listing = _listing(source, root, [top, *others], shares)
    if listing is None and prefixes:
        paths = joined(list_branch(replace(branch, prefixes=())) for branch in found)
        raise _no_split(source, [*map(readable, paths.images["path"].to_pylist()), *(entry.path for entry in paths.archives)])
    return _expected(source, listing)


def _listing_of(source: Source, root: str, files: list[storage.Entry]) -> Listing:
    listed = of_entries(files)
    return _expected(source, _listing(source, root, [listed], [share_of(listed.images, root, None)]))


def _expected(source: Source, listing: Listing | None) -> Listing:
    if listing is None:
        raise UserError(f"no images in {source.uri}: expected image files, .parquet or .tar")
    return listing


def _cut(items: Sequence[T]) -> list[Sequence[T]]:
    """Items in order as shares of about the same number."""
    each = -(-len(items) // SHARES)
    return [items[start : start + each] for start in range(0, len(items), each)]


def _listing(source: Source, root: str, listed: Sequence[Listed], shares: Sequence[FolderShare]) -> Listing | None:
    """The listing of what was found, or None where nothing can be read."""
    archives = sorted((entry for one in listed for entry in one.archives), key=lambda entry: entry.path)
    for kind in ("parquet", "tar"):
        some = tuple(entry for entry in archives if extension_of(entry.path) == f".{kind}")
        if some:
            return Listing(root, kind, some)
    if not any(len(share.codes) for share in shares):
        return None
    directories = {path: when for one in listed for path, when in one.directories.items()}
    return Listing(root, "folder", (), tuple(shares), sum(one.ignored for one in listed), directories)


def manifest_of(source: Source, listing: Listing, making: Making = IN_THIS_PROCESS) -> Manifest:
    """A listing in units, after looking into Parquet files and tars.

    Raises: UserError where a file is not what its name says.
    """
    if listing.format == "folder":
        return _folder_manifest(source, listing)
    return (_parquet_manifest if listing.format == "parquet" else _tar_manifest)(source, listing, making)


def _folder_manifest(source: Source, listing: Listing) -> Manifest:
    classes = sorted(set[str]().union(*(share.classes for share in listing.shares)))
    flat = next((share.flat for share in listing.shares if share.flat), "")
    if flat and classes:
        raise UserError(f"{source.uri} has images beside class folders ({flat}): expected one or the other")
    labels = numbered([share.codes for share in listing.shares], [share.classes for share in listing.shares], classes)
    parts = tuple(part for share in listing.shares for part in share.parts)
    reading = Reading("folder")
    return Manifest(
        source.uri, UnitTable(parts, even_edges(len(labels)), labels), reading, tuple(classes), len(classes),
        manifest_digest(reading, file_entries(parts)), listing.ignored, True, sum(share.size for share in listing.shares),
    )  # fmt: skip


def _parquet_manifest(source: Source, listing: Listing, making: Making) -> Manifest:
    columns = (source.image_column, source.label_column)
    work = partial(_parquet_share, root=listing.root, columns=columns)
    found = list(making.run(work, _cut(listing.archives)))
    scans = [scan for _, some in found for scan in some]
    labels = Labels(scans, source.label_column)
    group_rows = np.concatenate([scan.group_rows for scan in scans])
    edges = row_group_edges(group_rows)
    if not edges[-1]:
        raise UserError(f"no images in {source.uri}: its Parquet files have no rows")
    numbers = numbered([scan.label_codes for scan in scans], [scan.values for scan in scans], labels.values)
    reading = Reading("parquet", source.image_column, source.label_column if labels.there else None, labels.values)
    entries = [(file.path, file.size, scan.footer) for file, scan in zip(listing.archives, scans, strict=True)]
    said = ("labels", 0, storage.digest([scan.labels for scan in scans if scan.there]))
    groups = np.union1d(np.cumsum(group_rows), edges)  # a group that is larger than a unit is cut as units are
    units = UnitTable(tuple(part for parts, _ in found for part in parts), edges, numbers, groups)
    return Manifest(
        source.uri, units, reading, labels.classnames, labels.num_classes, manifest_digest(reading, [*entries, said]),
        labels_are_names=bool(labels.values), encoded_bytes=sum(scan.image_bytes for scan in scans),
        largest_group=int(group_rows.max()),
    )  # fmt: skip


def _parquet_share(
    files: Sequence[storage.Entry], root: str, columns: tuple[str, str], folder: str | None
) -> tuple[tuple[Part, ...], list[ParquetScan]]:
    looks = [partial(scan_parquet, storage.join(root, file.path), file.size, *columns) for file in files]
    scans = [storage.patiently(look) for look in looks]  # each file, lest one failure have all of them read again
    counts = [scan.rows for scan in scans]
    file = np.repeat(np.arange(len(scans)), counts)
    at = np.concatenate([np.arange(count) for count in counts])
    names = pa.array([b""], pa.binary()).take(pa.array(np.zeros(len(at), np.int8)))
    sizes = np.repeat([scan.size for scan in scans], counts)
    return parts_of(rows_of([scan.uri for scan in scans], file, names, at, sizes), folder), scans


@dataclass(frozen=True)
class TarSummary:
    """What the driver wants to know of a tar."""

    labels: np.ndarray
    """[images] int32."""
    members: str
    """Digest of all members."""
    size: int
    """Bytes of all images."""


def _tar_manifest(source: Source, listing: Listing, making: Making) -> Manifest:
    work = partial(_tar_share, root=listing.root)
    found = list(making.run(work, _cut(listing.archives)))
    scans = [scan for _, some in found for scan in some]
    labels = np.concatenate([scan.labels for scan in scans])
    if not len(labels):
        raise UserError(f"no images in {source.uri}: its tars have none")
    highest = int(labels.max())
    names = _tar_classnames(listing.root) if highest >= 0 else ()
    reading = Reading("tar", label_column="cls" if highest >= 0 else None)
    entries = [(file.path, file.size, scan.members) for file, scan in zip(listing.archives, scans, strict=True)]
    # A unit does not cross tars, so that what it reads of one lies side by side.
    units = UnitTable(
        tuple(part for parts, _ in found for part in parts), file_edges([len(scan.labels) for scan in scans]), labels
    )
    return Manifest(
        source.uri, units, reading, names, max(len(names), highest + 1), manifest_digest(reading, entries),
        encoded_bytes=sum(scan.size for scan in scans),
    )  # fmt: skip


def _tar_share(files: Sequence[storage.Entry], root: str, folder: str | None) -> tuple[tuple[Part, ...], list[TarSummary]]:
    parts: list[Part] = []
    summaries: list[TarSummary] = []
    for file in files:
        uri = storage.join(root, file.path)
        scan = storage.patiently(partial(scan_tar, uri))  # not all of the share's again
        nothing = np.zeros(len(scan.names), np.int64)
        names, at, sizes = pa.array(scan.names, pa.binary()), np.array(scan.at, np.int64), np.array(scan.sizes, np.int64)
        parts += parts_of(rows_of([uri], nothing, names, at, sizes), folder)
        summaries.append(TarSummary(np.array(scan.labels, np.int32), scan.members, int(np.maximum(sizes, 0).sum())))
    return tuple(parts), summaries


def _tar_classnames(root: str) -> tuple[str, ...]:
    """classnames.txt beside the tars or one folder up, one name a line."""
    for uri in (
        storage.join(root, "classnames.txt"),
        storage.join(posixpath.dirname(root.rstrip("/")) or ".", "classnames.txt"),
    ):
        if storage.exists(uri):
            return tuple(line.strip() for line in storage.read_text(uri).splitlines() if line.strip())
    return ()
