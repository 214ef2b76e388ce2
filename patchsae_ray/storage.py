"""Files under any URI: a local path, s3://, hf://, whatever fsspec opens."""

import hashlib
import logging
import os
import posixpath
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from patchsae_ray.errors import AccessError, NotFound, StoreError, UserError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 300.0
"""How long a worker goes on trying a store that does not answer."""
LISTING_THREADS = 32
READING_THREADS = 16


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


def is_local(uri: str) -> bool:
    """Whether a path or URI lies on this machine."""
    return "://" not in uri or uri.startswith("file://")


def filesystem_of(uri: str) -> tuple[Any, str]:
    try:
        return url_to_fs(uri)
    except Exception as error:
        raise UserError(f"cannot open {uri}: {first_line(error)}") from error


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Whatever a file system raises (each client has types of its own) → one line that names the URI.

    Raises: NotFound where the store has answered that there is no such thing; AccessError where it refuses the credentials;
        UserError where a folder and a file are taken for each other; StoreError for all else. MemoryError stays as it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise NotFound(f"no such {'bucket' if 'bucket does not exist' in str(error) else 'file'}: {uri}") from error
    except IsADirectoryError as error:
        raise NotFound(f"{uri} is a folder, not a file") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {uri}: a file is where a folder should be") from error
    except PermissionError as error:
        raise AccessError(f"no permission for {uri}: {first_line(error)}") from error
    except Exception as error:
        raise StoreError(f"cannot reach {uri}: {first_line(error)}") from error


def _error_code(error: BaseException) -> str:
    """S3's code of an error, in s3fs's wrapping or without; empty where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return ""


def patiently(work: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """Do `work`; where the store does not answer, try again with growing pauses.

    Raises: StoreError once `seconds` have passed; any other error at once.
    """
    deadline, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return work()
        except StoreError as error:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 15.0)


def absolute(uri: str) -> str:
    """A local path made absolute, so that it means the same in every process; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)  # noqa: PTH100 - Path.resolve would follow links


def info(uri: str) -> dict[str, Any] | None:
    """What the store says of a file or folder now, or None where there is none.

    Not by the file system's `exists` and `isdir`: on S3 those say no where the truth is that access is denied.

    Raises: UserError where access is denied, StoreError where the store cannot be reached.
    """
    filesystem, path = filesystem_of(uri)
    with reaching(uri):
        filesystem.invalidate_cache()  # object-store clients remember listings, and others may have written since
        try:
            found: dict[str, Any] = filesystem.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found


def exists(uri: str) -> bool:
    """Whether a file or folder is there now.

    Raises: UserError where access is denied, StoreError where the store cannot be reached.
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

    Raises: UserError where there is no such file.
    """
    filesystem, path = filesystem_of(uri)
    with reaching(uri):
        return int(filesystem.size(path))


def open_read(uri: str) -> IO[bytes]:
    """Open for reading.

    Raises: UserError where there is no such file or it may not be read.
    """
    with reaching(uri):
        if not is_local(uri):
            filesystem_of(uri)[0].invalidate_cache()  # an old listing would hide a new file
        opened: IO[bytes] = fsspec.open(uri, "rb").open()
        return opened


def read_bytes(uri: str) -> bytes:
    """A whole file.

    Raises: UserError as `open_read`.
    """
    with open_read(uri) as file, reaching(uri):
        return file.read()


def read_many(uris: Sequence[str]) -> list[bytes | NotFound]:
    """Whole files, several at once; for each its bytes, or the error that says that it is not there.

    On S3 each file is one GET.

    Raises: StoreError where the store cannot be reached, AccessError where it refuses the credentials.
    """
    contents: list[bytes | NotFound] = []
    for found in _fetch([(uri, None, None) for uri in uris]):
        if isinstance(found, UserError) and not isinstance(found, NotFound):
            raise found
        contents.append(found)
    return contents


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
        for (index, _), found in zip(places, _cat_ranges(filesystem, [path for _, path in places], bounds), strict=True):
            results[index] = found if isinstance(found, bytes) else _said_of(wanted[index][0], found)
    for failed in results:
        if isinstance(failed, StoreError):
            raise failed
    return results


def _cat_ranges(filesystem: Any, paths: list[str], bounds: list[tuple[int | None, int | None]]) -> list[bytes | Exception]:
    """fsspec's `cat_ranges`, which only asynchronous clients do several at a time; the others, threads."""
    begins, ends = ([bound[side] for bound in bounds] for side in (0, 1))
    if filesystem.async_impl:
        options = {"max_concurrency": 1} if "s3" in filesystem.protocol else {}  # else s3fs asks for each size first
        found: list[bytes | Exception] = filesystem.cat_ranges(paths, begins, ends, on_error="return", **options)
        return found

    def read(path: str, begin: int | None, end: int | None) -> bytes | Exception:
        try:
            content: bytes = filesystem.cat_file(path, start=begin, end=end)
        except Exception as error:
            return error
        return content

    with ThreadPoolExecutor(min(READING_THREADS, len(paths))) as pool:
        return list(pool.map(read, paths, begins, ends))


def _said_of(uri: str, error: Exception) -> UserError:
    """The error of one of several reads as `reaching` puts it; a range that begins after the end is a file cut short.

    Raises: MemoryError, which is not the store's.
    """
    if _error_code(error) in ("InvalidRange", "416"):
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

    Raises: UserError where access is denied, StoreError where the store cannot be reached.
    """
    filesystem, root = filesystem_of(uri)
    root = root.rstrip("/")
    with reaching(uri):
        filesystem.invalidate_cache()
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


def list_files(uri: str) -> list[Entry]:
    """`entries` of a folder that must be there.

    Raises: UserError where there is no such folder, or as `entries`.
    """
    if not is_directory(uri):
        raise UserError(f"no such folder: {uri}")
    return entries(uri)


def glob_files(pattern: str) -> tuple[str, list[Entry]]:
    """(folder before the first `*`, files as `list_files` gives them) of a pattern.

    Raises: UserError where access is denied, StoreError where the store cannot be reached.
    """
    filesystem, full = filesystem_of(pattern)
    with reaching(pattern):
        found = filesystem.glob(full, detail=True)
    root = posixpath.dirname(full.split("*")[0])
    files = [entry_of(path[len(root) + 1 :], found[path]) for path in sorted(found) if found[path]["type"] != "directory"]
    return posixpath.dirname(pattern.split("*")[0]), files


def modified(uri: str) -> float:
    """When a file was last written, in seconds since 1970, by the store's clock.

    Raises: UserError where there is no such file.
    """
    filesystem, path = filesystem_of(uri)
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
