"""Files under any URI: a local path, s3://, hf://, whatever fsspec opens."""

import hashlib
import os
import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from patchsae_ray.errors import NotFound, StoreError, UserError
from patchsae_ray.faults import patiently as patiently
from patchsae_ray.faults import reaching, s3_code
from patchsae_ray.filesystems import READAHEAD_BYTES, Cache, Opened, cat_ranges, filesystem_of, fresh, is_local
from patchsae_ray.filesystems import READING_THREADS as READING_THREADS
from patchsae_ray.names import expanded

LISTING_THREADS = 32


@dataclass(frozen=True)
class Entry:
    """A file of a listing."""

    path: str
    """Relative to what was listed."""
    size: int
    """Bytes."""
    version: str
    """What changes when the file does: the store's tag, or the time of modification."""


def join(root: str, *parts: str) -> str:
    """`root/part/...` for a local path or a URI."""
    return posixpath.join(root.rstrip("/") or "/", *parts)


def absolute(uri: str) -> str:
    """A local path expanded and made absolute, so that it means the same in every process; a URI expanded."""
    uri = expanded(uri)
    return uri if "://" in uri else os.path.abspath(uri)  # noqa: PTH100 - Path.resolve would follow links


def info(uri: str) -> dict[str, Any] | None:
    """What the store says of a file or folder now, or None where there is none.

    Not by the file system's `exists` and `isdir`: on S3 those say no where the truth is that access is denied.

    Raises: AccessError where access is denied, StoreError where the store cannot be reached.
    """
    filesystem, path = fresh(uri)
    with reaching(uri):
        try:
            found: dict[str, Any] = filesystem.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found


def exists(uri: str) -> bool:
    """Whether a file or folder is there now.

    Raises: AccessError where access is denied, StoreError where the store cannot be reached.
    """
    return info(uri) is not None


def is_directory(uri: str) -> bool:
    """Whether a folder is there now.

    Raises: as `exists`.
    """
    found = info(uri)
    return found is not None and found["type"] == "directory"


def size(uri: str) -> int:
    """Bytes of a file.

    Raises: NotFound where there is no such file; else as `exists`.
    """
    filesystem, path = fresh(uri)
    with reaching(uri):
        return int(filesystem.size(path))


def open_read(uri: str, cache: Cache = "readahead") -> IO[bytes]:
    """Open for reading; the file's own calls raise the same errors, so that none of a parser's is taken for the store's.

    Args:
        uri: the file.
        cache: where the file is remote, "readahead" to read it in order: nothing is fetched twice, and at most
            `READAHEAD_BYTES` more than is read; "none" to read parts of it, each with one request of its own.

    Raises: NotFound where there is no such file, AccessError where it may not be read, StoreError where the store cannot be
        reached.
    """
    filesystem, path = fresh(uri)
    options = {} if is_local(uri) else {"block_size": READAHEAD_BYTES, "cache_type": cache}
    with reaching(uri):
        return cast(IO[bytes], Opened(filesystem.open(path, "rb", **options), uri))


def read_bytes(uri: str) -> bytes:
    """A whole file; on S3 one GET.

    Raises: as `open_read`.
    """
    found = _fetch([(uri, None, None)])[0]
    if isinstance(found, UserError):
        raise found
    return found


def read_many(uris: Sequence[str], roots: Sequence[str] = ()) -> list[bytes | NotFound]:
    """Whole files, several at once; for each its bytes, or the error that says that it is not there.

    On S3 each file is one GET.

    Args:
        uris: the files.
        roots: the folder of each file's data set, where the file should be there: a local one is then missing only where its
            folder is there, and the data set's is not empty. Else its mount is lost, and may come back.

    Raises: StoreError where the store cannot be reached, AccessError where it refuses the credentials.
    """
    contents: list[bytes | NotFound] = []
    for index, found in enumerate(_fetch([(uri, None, None) for uri in uris])):
        if isinstance(found, UserError) and not isinstance(found, NotFound):
            raise found
        if isinstance(found, NotFound) and roots and is_local(uris[index]):
            _refuse_lost(uris[index], roots[index])
        contents.append(found)
    return contents


def _refuse_lost(uri: str, root: str) -> None:
    """Of a local file that was not found.

    Raises: StoreError where that is put down to its mount.
    """
    file, top = (Path(filesystem_of(one)[1]) for one in (uri, root))
    said = ""
    with reaching(uri):
        if not file.parent.is_dir():
            said = f"{file.parent} is not there"
        elif file.parent == top and _is_empty(top):
            said = f"{top} is empty"
        elif file.is_file():
            said = "it was away for a moment"
    if said:
        raise StoreError(f"cannot reach {uri}: {said}")


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as found:
        return next(found, None) is None


def read_ranges(wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Byte ranges of one or of many files, several at once; on S3 each is one GET of just these bytes.

    Args:
        wanted: (file, first byte, byte after the last) of each range, 0 <= first <= last.

    Returns: the ranges' bytes, in their order.

    Raises: NotFound where a file is not there, UserError where it ends before its range does, StoreError where the store
        cannot be reached, AccessError where it refuses the credentials.
    """
    contents: list[bytes] = []
    for (uri, begin, end), found in zip(wanted, _fetch(wanted), strict=True):
        if isinstance(found, UserError):
            raise found
        if len(found) != end - begin:
            raise UserError(f"{uri} is cut short: {len(found)} bytes from {begin} on, expected {end - begin}")
        contents.append(found)
    return contents


def _fetch(wanted: Sequence[tuple[str, int | None, int | None]]) -> list[bytes | UserError]:
    """For each range of a file, or whole file where the bounds are None: its bytes, or the error.

    Raises: StoreError where one of them could not be fetched though it may be there.
    """
    results: list[bytes | UserError] = [b""] * len(wanted)
    by_filesystem: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for index, (uri, begin, end) in enumerate(wanted):
        if end is None or end != begin:
            filesystem, path = filesystem_of(uri)
            by_filesystem.setdefault(id(filesystem), (filesystem, []))[1].append((index, path))
    for filesystem, places in by_filesystem.values():
        bounds = [wanted[index][1:] for index, _ in places]
        for (index, _), found in zip(places, cat_ranges(filesystem, [path for _, path in places], bounds), strict=True):
            results[index] = found if isinstance(found, bytes) else _said_of(wanted[index][0], found)
    for failed in results:
        if isinstance(failed, StoreError):
            raise failed
    return results


def _said_of(uri: str, error: Exception) -> UserError:
    """The error of one of several reads as `reaching` puts it; a range that begins after the end is a file cut short.

    Raises: MemoryError, which is not the store's.
    """
    if s3_code(error) in ("InvalidRange", "416"):
        return UserError(f"{uri} is cut short: nothing is left at the range's first byte")
    try:
        with reaching(uri):
            raise error
    except UserError as said:
        return said


def read_text(uri: str) -> str:
    """A whole file as UTF-8.

    Raises: UserError as `open_read`, or where it is no text.
    """
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is not a text file") from error


def entries(uri: str) -> list[Entry]:
    """All files under a folder, sorted by path; empty where there is no such folder. Sub-folders are listed in parallel.

    Raises: AccessError where access is denied, StoreError where the store cannot be reached.
    """
    filesystem, root = fresh(uri)
    root = root.rstrip("/")
    with reaching(uri):
        try:
            here = filesystem.ls(root, detail=True)
        except FileNotFoundError:
            return []
        found, folders = _split(here)
        while len(folders) == 1:  # a lone folder between the root and where it branches
            inside, folders = _split(filesystem.ls(folders[0], detail=True))
            found += inside
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            for listed in pool.map(lambda folder: filesystem.find(folder, detail=True), folders):
                found += listed.values()
    files = {one["name"][len(root) + 1 :]: one for one in found}
    return [entry_of(path, files[path]) for path in sorted(files) if path and not path.endswith("/")]


def _split(listed: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(files, names of folders) of one listing; a local link to a folder is a folder."""
    files, folders = [], []
    for one in listed:
        linked = one.get("islink") and Path(one["name"]).is_dir()
        if one["type"] == "directory" or linked:
            folders.append(one["name"])
        else:
            files.append(one)
    return files, folders


def entry_of(path: str, said: dict[str, Any]) -> Entry:
    """What a file system says of a file, as an entry of a listing."""
    version = next((str(said[key]) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if said.get(key)), "")
    return Entry(path, int(said.get("size") or 0), version)


def glob_files(pattern: str) -> tuple[str, list[Entry]]:
    """(folder before the first `*`, files as entries) of a pattern.

    Raises: AccessError where access is denied, StoreError where the store cannot be reached.
    """
    filesystem, full = fresh(pattern)
    with reaching(pattern):
        found = filesystem.glob(full, detail=True)
    root = posixpath.dirname(full.split("*")[0])
    files = [entry_of(path[len(root) + 1 :], found[path]) for path in sorted(found) if found[path]["type"] != "directory"]
    return posixpath.dirname(pattern.split("*")[0]), files


def modified(uri: str) -> float:
    """When a file was last written, in seconds since 1970, by the store's clock.

    Raises: NotFound where there is no such file; else as `exists`.
    """
    filesystem, path = fresh(uri)
    with reaching(uri):
        return float(filesystem.modified(path).timestamp())


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 (hex, 32 characters) over length-prefixed parts: strings, or whatever has a contiguous buffer."""
    hasher = hashlib.sha256()
    for part in parts:
        data = memoryview(part.encode() if isinstance(part, str) else part).cast("B")
        hasher.update(data.nbytes.to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()[:32]
