"""Files under any URI: a local path, s3://, hf://, whatever fsspec opens."""

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from patchsae_ray.errors import UserError


def join(root: str, *parts: str) -> str:
    """`root/part/...` for a local path or a URI."""
    return posixpath.join(root.rstrip("/") or "/", *parts)


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        return url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {uri}: {error}") from error


def exists(uri: str) -> bool:
    filesystem, path = _filesystem(uri)
    return bool(filesystem.exists(path))


def is_directory(uri: str) -> bool:
    filesystem, path = _filesystem(uri)
    return bool(filesystem.isdir(path))


def open_read(uri: str) -> IO[bytes]:
    """Open for reading.

    Raises: UserError where there is no such file or it may not be read.
    """
    try:
        opened: IO[bytes] = fsspec.open(uri, "rb").open()
        return opened
    except FileNotFoundError as error:
        raise UserError(f"no such file: {uri}") from error
    except IsADirectoryError as error:
        raise UserError(f"{uri} is a folder, not a file") from error
    except PermissionError as error:
        raise UserError(f"no permission to read {uri}") from error


def read_bytes(uri: str) -> bytes:
    with open_read(uri) as file:
        return file.read()


def read_text(uri: str) -> str:
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is not a text file") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file or nothing: a reader sees the old content or the new, never a part.

    Local files go through a temporary file and a rename; a put to an object store is atomic by itself.
    """
    filesystem, path = _filesystem(uri)
    try:
        if not is_local(uri):
            filesystem.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except PermissionError as error:
        raise UserError(f"no permission to write {uri}") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {uri}: a file is where a folder should be") from error


def remove(uri: str) -> None:
    """Remove a file if it is there."""
    filesystem, path = _filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm_file(path)


def list_files(uri: str) -> list[tuple[str, int]]:
    """All files under a folder as (path relative to it, bytes), sorted by path.

    Raises: UserError where there is no such folder.
    """
    filesystem, root = _filesystem(uri)
    if not filesystem.isdir(root):
        raise UserError(f"no such folder: {uri}")
    root = root.rstrip("/")
    found = filesystem.find(root, detail=True)
    return sorted((path[len(root) + 1 :], int(info.get("size") or 0)) for path, info in found.items())


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 (hex, 32 characters) over length-prefixed parts: strings, or whatever has a contiguous buffer."""
    hasher = hashlib.sha256()
    for part in parts:
        data = memoryview(part.encode() if isinstance(part, str) else part).cast("B")
        hasher.update(data.nbytes.to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()[:32]
