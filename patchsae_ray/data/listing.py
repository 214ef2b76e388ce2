"""What lies under a folder: image files as rows of Arrow, for there may be many; Parquet files and tars one by one."""

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from patchsae_ray import storage
from patchsae_ray.data.s3_pages import s3_pages
from patchsae_ray.errors import NotFound, UserError

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ARCHIVE_EXTENSIONS = frozenset({".parquet", ".tar"})
_ARCHIVE_ENDS = tuple(ARCHIVE_EXTENSIONS)
_ROWS_AT_ONCE = 65_536
_LISTED = pa.schema([("path", pa.large_binary()), ("size", pa.int64())])
"""Path under the root; bytes."""


NOTHING = _LISTED.empty_table()


@dataclass
class Listed:
    """The files of a folder, hidden ones apart."""

    images: pa.Table
    """path, size; sorted by path."""
    archives: list[storage.Entry] = field(default_factory=list)
    """Parquet files and tars, sorted by path."""
    ignored: int = 0
    """Other files."""
    directories: dict[str, int] = field(default_factory=dict)
    """Of a local folder: directory → time of its last change in ns, before it was read."""


def extension_of(path: str) -> str:
    """A path's extension in lower case with its dot, or an empty string."""
    return posixpath.splitext(path)[1].lower()


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


class _Collecting:
    """Files as they come → `Listed`, at some 40 bytes an image."""

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes
        self._paths: list[bytes] = []
        self._sizes: list[int] = []
        self._batches: list[pa.RecordBatch] = []
        self.listed = Listed(NOTHING)

    def add(self, path: str, size: int, version: Any = None) -> None:
        if _hidden(path) or (self._prefixes and not posixpath.basename(path).startswith(self._prefixes)):
            return
        extension = path[path.rfind(".") :].lower()  # what has a slash in it is none of ours
        if extension in IMAGE_EXTENSIONS:
            self._paths.append(os.fsencode(path))
            self._sizes.append(size)
            if len(self._paths) == _ROWS_AT_ONCE:
                self._flush()
        elif extension in ARCHIVE_EXTENSIONS:
            self.listed.archives.append(storage.entry_of(path, {"size": size, **(version or {})}))
        else:
            self.listed.ignored += 1

    def _flush(self) -> None:
        columns = [pa.array(self._paths, pa.large_binary()), pa.array(self._sizes, pa.int64())]
        self._batches.append(pa.RecordBatch.from_arrays(columns, schema=_LISTED))
        self._paths, self._sizes = [], []

    def done(self) -> Listed:
        self._flush()
        batches, self._batches = self._batches, []
        self.listed.images = in_order(pa.Table.from_batches(batches, _LISTED))
        self.listed.archives.sort(key=lambda entry: entry.path)
        return self.listed


def in_order(table: pa.Table) -> pa.Table:
    """Rows of (path, size) sorted by path."""
    paths = table["path"]
    if all(_ascending(chunk) for chunk in paths.chunks) and _ascending(_ends(paths)):
        return table
    return table.take(pc.sort_indices(table, [("path", "ascending")]))


def _ascending(values: pa.Array) -> bool:
    return len(values) < 2 or bool(pc.all(pc.less_equal(values[:-1], values[1:])).as_py())


def _ends(column: pa.ChunkedArray) -> pa.Array:
    """The first and last value of each chunk."""
    ends = [value for chunk in column.chunks if len(chunk) for value in (chunk[0], chunk[-1])]
    return pa.array([end.as_py() for end in ends], column.type)


def joined(found: Iterable[Listed]) -> Listed:
    """What several folders hold, together."""
    several = list(found)
    whole = Listed(in_order(pa.concat_tables([NOTHING, *(one.images for one in several)])))
    for one in several:
        whole.archives += one.archives
        whole.ignored += one.ignored
        whole.directories.update(one.directories)
    whole.archives.sort(key=lambda entry: entry.path)
    return whole


def of_entries(entries: Iterable[storage.Entry]) -> Listed:
    """Files that are known already."""
    collecting = _Collecting(())
    for entry in entries:
        collecting.add(entry.path, entry.size, {"ETag": entry.version})
    return collecting.done()


@dataclass(frozen=True)
class Branch:
    """A folder below the root of a listing, or the root's own files."""

    root: str
    path: str
    """Under the root; empty for the root."""
    deep: bool
    """With all that is below it."""
    prefixes: tuple[str, ...] = ()
    """Only files whose names begin so."""
    above: tuple[tuple[int, int], ...] = ()
    """Local: (device, inode) of the root and of the folders down to this one, which a link must not lead back to."""


def list_branch(branch: Branch) -> Listed:
    """The files of a branch.

    Raises: UserError where access is denied, StoreError where the store cannot be reached.
    """
    collecting = _Collecting(branch.prefixes)
    uri = storage.join(branch.root, branch.path) if branch.path else branch.root
    with storage.reaching(uri):
        if storage.is_local(branch.root):
            with _permitted():
                _walk(branch, collecting)
        else:
            for name, size, version in _remote(uri, branch.deep):
                collecting.add(posixpath.join(branch.path, name), size, version)
    return collecting.done()


def _walk(branch: Branch, collecting: _Collecting) -> None:
    root = branch.root.removeprefix("file://")
    waiting = [(branch.path, branch.above)]
    while waiting:
        path, above = waiting.pop()
        folder = posixpath.join(root, path) if path else root
        own = _read_folder(folder, path, collecting)
        above = (*above, own.identity)
        for name in reversed(own.below if branch.deep else ()):
            found = Path(folder, name).stat()
            if not name.startswith(".") and (found.st_dev, found.st_ino) not in above:
                waiting.append((posixpath.join(path, name), above))


@dataclass(frozen=True)
class _Folder:
    """What a local folder is, and which folders are in it."""

    identity: tuple[int, int]
    below: list[str]


def _read_folder(folder: str, path: str, collecting: _Collecting) -> _Folder:
    """Take in a local folder's files."""
    own = Path(folder).stat()
    collecting.listed.directories[folder] = own.st_mtime_ns
    below: list[str] = []
    prefix = f"{path}/" if path else ""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                below.append(entry.name)
                continue
            found = _stat(entry)
            if found is None or stat.S_ISREG(found.st_mode):
                archive = found is not None and entry.name[-8:].lower().endswith(_ARCHIVE_ENDS)
                said = {"mtime": found.st_mtime} if found is not None and archive else None
                collecting.add(prefix + entry.name, found.st_size if found is not None else 0, said)
    return _Folder((own.st_dev, own.st_ino), below)


@contextmanager
def _permitted() -> Iterator[None]:
    """Reading of local folders.

    Raises: UserError where this user may not: nothing would change while one waits.
    """
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{os.fsdecode(error.filename or '')}: no permission to list this folder") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is one or leads to one; a link that leads to itself does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _stat(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """None where a link leads nowhere."""
    try:
        return entry.stat()
    except OSError:
        return None


def _remote(uri: str, deep: bool) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(path under it, bytes, what the store says) of each file of a remote folder; S3's come page by page."""
    filesystem, root = storage.filesystem_of(uri)
    root = root.rstrip("/")
    filesystem.invalidate_cache()
    if "s3" in filesystem.protocol:
        skipped = len(root.partition("/")[2]) + 1 if "/" in root else 0
        for page in s3_pages(uri, deep):
            for said in page.get("Contents", ()):
                if not said["Key"].endswith("/"):
                    yield said["Key"][skipped:], int(said["Size"]), said
        return
    found = filesystem.find(root, detail=True) if deep else {one["name"]: one for one in filesystem.ls(root, detail=True)}
    for name, said in found.items():
        if said["type"] != "directory" and len(name) > len(root):
            yield name[len(root) + 1 :], int(said.get("size") or 0), said


def branches(root: str, prefixes: tuple[str, ...] = ()) -> list[Branch]:
    """A folder as branches that can be listed at the same time, in order of their paths; empty where it is not there.

    Raises: UserError where access is denied, StoreError where the store cannot be reached.
    """
    with storage.reaching(root):
        if storage.is_local(root):
            with _permitted():
                return _local_branches(root.removeprefix("file://"), prefixes)
        return _remote_branches(root, prefixes)


def _in_paths(folder: str) -> str:
    """What folders are sorted by, so that the paths of what is in them are in order: a-b/1 is before a/1."""
    return f"{folder}/"


def _local_branches(root: str, prefixes: tuple[str, ...]) -> list[Branch]:
    found: list[Branch] = []
    path = ""
    above: tuple[tuple[int, int], ...] = ()
    while True:
        folder = posixpath.join(root, path) if path else root
        own = Path(folder).stat()
        found.append(Branch(root, path, False, prefixes, above))
        above = (*above, (own.st_dev, own.st_ino))
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith("."))
        identities = {name: Path(folder, name).stat() for name in below}
        below = [name for name in below if (identities[name].st_dev, identities[name].st_ino) not in above]
        if len(below) != 1:
            inner = sorted((posixpath.join(path, name) for name in below), key=_in_paths)
            return [*found, *(Branch(root, name, True, prefixes, above) for name in inner)]
        path = posixpath.join(path, below[0])


def _remote_branches(root: str, prefixes: tuple[str, ...]) -> list[Branch]:
    filesystem, base = storage.filesystem_of(root)
    base = base.rstrip("/")
    filesystem.invalidate_cache()
    found: list[Branch] = []
    folder = base
    while True:
        path = folder[len(base) + 1 :]
        found.append(Branch(root, path, False, prefixes))
        try:
            below = sorted(_remote_folders(storage.join(root, path) if path else root), key=_in_paths)
        except (FileNotFoundError, NotFound):
            return []
        if len(below) != 1:
            return [*found, *(Branch(root, name[len(base) + 1 :], True, prefixes) for name in below)]
        folder = below[0]


def _remote_folders(uri: str) -> list[str]:
    """The folders right below one, as paths of its file system."""
    filesystem, folder = storage.filesystem_of(uri)
    if "s3" not in filesystem.protocol:
        return [one["name"] for one in filesystem.ls(folder, detail=True) if one["type"] == "directory"]
    bucket = folder.partition("/")[0]
    found = [said["Prefix"] for page in s3_pages(uri, deep=False) for said in page.get("CommonPrefixes", ())]
    return [f"{bucket}/{prefix[:-1]}" for prefix in found if not prefix.endswith("//")]
