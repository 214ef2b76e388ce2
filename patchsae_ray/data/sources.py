"""What lies under a URI → a manifest: image folders, Parquet files, WebDataset tars."""

import json
import posixpath
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from patchsae_ray import storage
from patchsae_ray.data.manifest import (
    NO_LABEL,
    UNIT_SIZE,
    Format,
    Manifest,
    Reading,
    Segment,
    Unit,
    cut_units,
    manifest_digest,
)
from patchsae_ray.errors import UserError, first_line, nearest

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Files = list[tuple[str, int]]
"""(path under the root, bytes), sorted."""


def build_manifest(uri: str, split: str | None = None, image_column: str = "image", label_column: str = "label") -> Manifest:
    """The manifest of a folder, a glob, or a single Parquet or tar file.

    Args:
        uri: a local path or fsspec URI; may hold `*`.
        split: the part of the data set: a sub-folder of that name, or files named `split-…` or `split.…`.
        image_column: Parquet's image column.
        label_column: Parquet's label column; where there is none the images have no labels.

    Raises: UserError where nothing is there, or nothing that can be read.
    """
    root, files = _list(uri)
    if split:
        root, files = _select_split(uri, root, files, split)
    found = _format_of(files)
    if found is None:
        raise UserError(f"no images in {uri}: expected image files, .parquet or .tar")
    if found == "parquet":
        return _parquet_manifest(uri, root, files, image_column, label_column)
    return {"folder": _folder_manifest, "tar": _tar_manifest}[found](uri, root, files)


def _list(uri: str) -> tuple[str, Files]:
    try:
        if "*" in uri:
            filesystem, pattern = url_to_fs(uri)
            paths = filesystem.glob(pattern, detail=True)
            fixed = posixpath.dirname(uri.split("*")[0])
            root = posixpath.dirname(pattern.split("*")[0])
            files = sorted((path[len(root) + 1 :], int(info["size"])) for path, info in paths.items())
            return fixed, files
        if storage.is_directory(uri):
            return uri, storage.list_files(uri)
        if storage.exists(uri):
            filesystem, path = url_to_fs(uri)
            return posixpath.dirname(uri) or ".", [(posixpath.basename(uri), int(filesystem.size(path)))]
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot list {uri}: {first_line(error)}") from error
    raise UserError(f"no such data set: {uri} is not there")


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _format_of(files: Files) -> Format | None:
    extensions = {_extension(path) for path, _ in files if not _hidden(path)}
    if ".parquet" in extensions:
        return "parquet"
    if ".tar" in extensions:
        return "tar"
    return "folder" if extensions & IMAGE_EXTENSIONS else None


def _select_split(uri: str, root: str, files: Files, split: str) -> tuple[str, Files]:
    inside = [(path.removeprefix(f"{split}/"), size) for path, size in files if path.startswith(f"{split}/")]
    if inside:
        return storage.join(root, split), inside
    named = [entry for entry in files if posixpath.basename(entry[0]).startswith((f"{split}-", f"{split}.", f"{split}_"))]
    if named:
        return root, named
    folders = {path.split("/")[0] for path, _ in files if "/" in path}
    stems = {posixpath.basename(path).split("-")[0].split(".")[0] for path, _ in files}
    there = sorted(folders or stems)
    raise UserError(f"--split {split}: not in {uri}, which has {', '.join(there[:8])}{nearest(split, there)}")


def _folder_manifest(uri: str, root: str, files: Files) -> Manifest:
    images = [entry for entry in files if _extension(entry[0]) in IMAGE_EXTENSIONS and not _hidden(entry[0])]
    flat = [path for path, _ in images if "/" not in path]
    classes = sorted({path.split("/")[0] for path, _ in images if "/" in path})
    if flat and classes:
        raise UserError(f"{uri} has images beside class folders ({flat[0]}): expected one or the other")
    number = {name: label for label, name in enumerate(classes)}
    names = tuple(path for path, _ in images)
    labels = tuple(number.get(path.split("/")[0], NO_LABEL) if "/" in path else NO_LABEL for path in names)
    reading = Reading("folder")
    segment = Segment(root, len(names), names=names, labels=labels)
    # `first` counts bytes or rows of a file, which a folder has not: it stays 0 so that equal units are equal.
    units = tuple(Unit(u.index, u.start, tuple(_at_zero(s) for s in u.segments)) for u in cut_units([segment]))
    entries = [(path, size, 1) for path, size in images]
    ignored = sum(not _hidden(path) for path, _ in files) - len(images)
    return Manifest(uri, units, reading, tuple(classes), len(classes), manifest_digest(reading, entries), ignored)


def _at_zero(segment: Segment) -> Segment:
    return Segment(segment.uri, segment.count, 0, segment.names, segment.labels)


def _parquet_manifest(uri: str, root: str, files: Files, image_column: str, label_column: str) -> Manifest:
    parquet = [(path, size) for path, size in files if _extension(path) == ".parquet" and not _hidden(path)]
    segments, entries, labels = [], [], _LabelScan(label_column)
    has_labels = False
    for path, size in parquet:
        file_uri = storage.join(root, path)
        with storage.open_read(file_uri) as opened:
            try:
                file = pq.ParquetFile(opened)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{file_uri} is not a whole Parquet file: {first_line(error)}") from error
            columns = file.schema_arrow.names
            if image_column not in columns:
                raise UserError(f"{file_uri} has no column {image_column!r}; it has {', '.join(columns)}")
            has_labels = label_column in columns
            if has_labels:
                labels.scan(file)
            segments.append(Segment(file_uri, file.metadata.num_rows))
            entries.append((path, size, file.metadata.num_rows))
    reading = Reading("parquet", image_column, label_column if has_labels else None, labels.values if has_labels else ())
    names = labels.classnames if has_labels else ()
    num_classes = max(len(names), labels.highest + 1) if has_labels else 0
    units = cut_units([segment for segment in segments if segment.count])
    if not units:
        raise UserError(f"no images in {uri}: its Parquet files have no rows")
    return Manifest(uri, units, reading, names, num_classes, manifest_digest(reading, entries))


class _LabelScan:
    """Class names and the number of classes, from each file's metadata where it has them, else from the label column."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.declared: tuple[str, ...] = ()
        self.strings: set[str] = set()
        self.highest = NO_LABEL

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(sorted(self.strings))

    @property
    def classnames(self) -> tuple[str, ...]:
        return self.values or self.declared

    def scan(self, file: Any) -> None:
        kind = file.schema_arrow.field(self.column).type
        self.declared = self.declared or _declared_names(file.schema_arrow, self.column)
        if pa.types.is_integer(kind):
            if not self.declared:
                column = file.read(columns=[self.column])[self.column]
                self.highest = max(self.highest, max((value for value in column.to_pylist() if value is not None), default=-1))
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
            self.strings.update(str(value) for value in file.read(columns=[self.column])[self.column].unique().to_pylist())
        else:
            raise UserError(f"label column {self.column!r} is {kind}; integers or strings would be right")


def _declared_names(schema: Any, column: str) -> tuple[str, ...]:
    """Hugging Face's ClassLabel names in the schema's metadata, if they are there."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except ValueError:
        return ()
    names = (features.get(column) or {}).get("names") or ()
    return tuple(str(name) for name in names)


def _tar_manifest(uri: str, root: str, files: Files) -> Manifest:
    tars = [(path, size) for path, size in files if _extension(path) == ".tar" and not _hidden(path)]
    segments, entries, highest = [], [], NO_LABEL
    for path, size in tars:
        file_uri = storage.join(root, path)
        offsets, top_label = _scan_tar(file_uri)
        highest = max(highest, top_label)
        for start in range(0, len(offsets), UNIT_SIZE):
            count = min(UNIT_SIZE, len(offsets) - start)
            segments.append(Segment(file_uri, count, offsets[start]))
        entries.append((path, size, len(offsets)))
    # A tar's unit begins at a member and does not cross files: a byte range is all that is kept of its index.
    starts = [sum(segment.count for segment in segments[:index]) for index in range(len(segments))]
    units = tuple(Unit(i, starts[i], (segment,)) for i, segment in enumerate(segments))
    if not units:
        raise UserError(f"no images in {uri}: its tars have none")
    names = _tar_classnames(root, files)
    reading = Reading("tar", label_column="cls" if highest >= 0 else None)
    num_classes = max(len(names), highest + 1) if highest >= 0 else 0
    return Manifest(uri, units, reading, names if highest >= 0 else (), num_classes, manifest_digest(reading, entries))


def _scan_tar(uri: str) -> tuple[list[int], int]:
    """Byte offset of the first member of every image sample, in order, and the highest label."""
    offsets: list[int] = []
    highest = NO_LABEL
    with storage.open_read(uri) as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r:") as archive:
                sample_start, previous, has_image = 0, "", False
                for member in archive:
                    key, extension = member_key(member.name)
                    if key != previous:
                        sample_start, previous, has_image = member.offset, key, False
                    if extension in IMAGE_EXTENSIONS and not has_image:
                        offsets.append(sample_start)
                        has_image = True
                    if extension == ".cls":
                        content = archive.extractfile(member)
                        highest = max(highest, int(content.read()) if content else NO_LABEL)
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{uri} is not a whole tar of images and .cls numbers: {first_line(error)}") from error
    return offsets, highest


def member_key(name: str) -> tuple[str, str]:
    """WebDataset's sample key and extension: the name is cut at the first dot of its last part."""
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    return posixpath.join(folder, stem), (dot + extension).lower()


def _tar_classnames(root: str, files: Files) -> tuple[str, ...]:
    """classnames.txt beside the tars or one folder up, one name a line."""
    for uri in (
        storage.join(root, "classnames.txt"),
        storage.join(posixpath.dirname(root.rstrip("/")) or ".", "classnames.txt"),
    ):
        if storage.exists(uri):
            return tuple(line.strip() for line in storage.read_text(uri).splitlines() if line.strip())
    return ()
