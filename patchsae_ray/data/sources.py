"""What lies under a URI → a manifest: image folders, Parquet files, WebDataset tars."""

import json
import posixpath
import tarfile
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    uri = storage.absolute(uri)
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
    if "*" in uri:
        return storage.glob_files(uri)
    if storage.is_directory(uri):
        return uri, storage.list_files(uri)
    if storage.exists(uri):
        return posixpath.dirname(uri), [(posixpath.basename(uri), storage.size(uri))]
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
    entries = [(path, size, "") for path, size in images]
    ignored = sum(not _hidden(path) for path, _ in files) - len(images)
    return Manifest(uri, units, reading, tuple(classes), len(classes), manifest_digest(reading, entries), ignored, True)


def _at_zero(segment: Segment) -> Segment:
    return Segment(segment.uri, segment.count, 0, segment.names, segment.labels)


def _parquet_manifest(uri: str, root: str, files: Files, image_column: str, label_column: str) -> Manifest:
    segments, entries, labels = [], [], _LabelScan(label_column)
    for path, size in files:
        if _extension(path) != ".parquet" or _hidden(path):
            continue
        file_uri = storage.join(root, path)
        with storage.open_read(file_uri) as opened:
            try:
                file = pq.ParquetFile(opened)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{file_uri} is not a whole Parquet file: {first_line(error)}") from error
            if image_column not in file.schema_arrow.names:
                raise UserError(f"{file_uri} has no column {image_column!r}; it has {', '.join(file.schema_arrow.names)}")
            labels.scan(file, file_uri)
            segments.append(Segment(file_uri, file.metadata.num_rows))
            entries.append((path, size, storage.digest([_footer(opened, size)])))
    units = cut_units([segment for segment in segments if segment.count])
    if not units:
        raise UserError(f"no images in {uri}: its Parquet files have no rows")
    reading = Reading("parquet", image_column, label_column if labels.there else None, labels.values)
    digest = manifest_digest(reading, [*entries, ("labels", 0, labels.digest())])
    return Manifest(uri, units, reading, labels.classnames, labels.num_classes, digest, labels_are_names=bool(labels.values))


def _footer(opened: IO[bytes], size: int) -> bytes:
    """A Parquet file's footer: where each column's pages lie, how large they are, their statistics."""
    opened.seek(size - 8)
    length = int.from_bytes(opened.read(4), "little")
    opened.seek(size - 8 - length)
    return opened.read(length)


class _LabelScan:
    """All labels of a Parquet data set: how many classes, their names, and whether every file has them."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.there: bool | None = None
        self.values: tuple[str, ...] = ()
        """Distinct string labels, sorted; empty where labels are numbers."""
        self._declared: tuple[str, ...] = ()
        self._highest = NO_LABEL
        self._digests: list[str] = []

    @property
    def classnames(self) -> tuple[str, ...]:
        return (self.values or self._declared) if self.there else ()

    @property
    def num_classes(self) -> int:
        return max(len(self.classnames), self._highest + 1) if self.there else 0

    def digest(self) -> str:
        return storage.digest(self._digests)

    def scan(self, file: Any, uri: str) -> None:
        """Take in one file.

        Raises: UserError where it has labels and another has not, or labels of a kind that are none.
        """
        there = self.column in file.schema_arrow.names
        if self.there not in (None, there):
            raise UserError(f"{uri} has {'a' if there else 'no'} column {self.column!r}, other files of it differ")
        self.there = there
        if not there:
            return
        kind = file.schema_arrow.field(self.column).type
        self._declared = self._declared or _declared_names(file.schema_arrow, self.column)
        column = file.read(columns=[self.column])[self.column]
        if pa.types.is_integer(kind):
            labels = column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
            self._highest = max(self._highest, int(labels.max(initial=NO_LABEL)))
            self._digests.append(storage.digest([labels.tobytes()]))
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
            strings = [str(value) for value in column.to_pylist() if value is not None]
            self.values = tuple(sorted({*self.values, *strings}))
            self._digests.append(storage.digest(strings))
        else:
            raise UserError(f"{uri}: label column {self.column!r} is {kind}; integers or strings would be right")


def _declared_names(schema: Any, column: str) -> tuple[str, ...]:
    """Hugging Face's ClassLabel names in the schema's metadata, if they are there."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except ValueError:
        return ()
    names = (features.get(column) or {}).get("names") or ()
    return tuple(str(name) for name in names)


def _tar_manifest(uri: str, root: str, files: Files) -> Manifest:
    segments: list[Segment] = []
    entries, highest = [], NO_LABEL
    for path, size in files:
        if _extension(path) != ".tar" or _hidden(path):
            continue
        file_uri = storage.join(root, path)
        scan = _scan_tar(file_uri)
        highest = max(highest, scan.highest)
        for start in range(0, len(scan.offsets), UNIT_SIZE):
            segments.append(Segment(file_uri, min(UNIT_SIZE, len(scan.offsets) - start), scan.offsets[start]))
        entries.append((path, size, storage.digest(scan.members)))
    # A tar's unit begins at a member and does not cross files: a byte offset is all that is kept of its index.
    starts = [sum(segment.count for segment in segments[:index]) for index in range(len(segments))]
    units = tuple(Unit(index, starts[index], (segment,)) for index, segment in enumerate(segments))
    if not units:
        raise UserError(f"no images in {uri}: its tars have none")
    labelled = highest >= 0
    names = _tar_classnames(root, files) if labelled else ()
    reading = Reading("tar", label_column="cls" if labelled else None)
    return Manifest(uri, units, reading, names, max(len(names), highest + 1), manifest_digest(reading, entries))


@dataclass
class _TarScan:
    offsets: list[int] = field(default_factory=list)
    """Byte where the first member of each image sample begins."""
    members: list[str] = field(default_factory=list)
    """Name, size, time and place of each member, and each label."""
    highest: int = NO_LABEL


def _scan_tar(uri: str) -> _TarScan:
    scan = _TarScan()
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


def _tar_classnames(root: str, files: Files) -> tuple[str, ...]:
    """classnames.txt beside the tars or one folder up, one name a line."""
    for uri in (
        storage.join(root, "classnames.txt"),
        storage.join(posixpath.dirname(root.rstrip("/")) or ".", "classnames.txt"),
    ):
        if storage.exists(uri):
            return tuple(line.strip() for line in storage.read_text(uri).splitlines() if line.strip())
    return ()
