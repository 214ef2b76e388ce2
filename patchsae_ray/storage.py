"""Files under any URI: a local path, s3://, hf://, whatever fsspec opens."""

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from patchsae_ray.errors import UserError, first_line


def join(root: str, *parts: str) -> str:
    """`root/part/...` for a local path or a URI."""
    return posixpath.join(root.rstrip("/") or "/", *parts)


def is_local(uri: str) -> bool:
    """Whether a path or URI lies on this machine."""
    return "://" not in uri or uri.startswith("file://")


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        return url_to_fs(uri)
    except Exception as error:
        raise UserError(f"cannot open {uri}: {first_line(error)}") from error


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Whatever a file system raises (each client has types of its own) → one line that names the URI."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no such file: {uri}") from error
    except IsADirectoryError as error:
        raise UserError(f"{uri} is a folder, not a file") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {uri}: a file is where a folder should be") from error
    except PermissionError as error:
        raise UserError(f"no permission for {uri}: {first_line(error)}") from error
    except Exception as error:
        raise UserError(f"cannot reach {uri}: {first_line(error)}") from error


def absolute(uri: str) -> str:
    """A local path made absolute, so that it means the same in every process; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)  # noqa: PTH100 - Path.resolve would follow links


def exists(uri: str) -> bool:
    """Whether a file or folder is there now: object-store clients remember listings, and others may have written since.

    Raises: UserError where the store cannot be reached.
    """
    filesystem, path = _filesystem(uri)
    with _reaching(uri):
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))


def is_directory(uri: str) -> bool:
    """Whether a folder is there.

    Raises: UserError where the store cannot be reached.
    """
    filesystem, path = _filesystem(uri)
    with _reaching(uri):
        return bool(filesystem.isdir(path))


def size(uri: str) -> int:
    """Bytes of a file.

    Raises: UserError where there is no such file.
    """
    filesystem, path = _filesystem(uri)
    with _reaching(uri):
        return int(filesystem.size(path))


def check_writable(folder: str) -> None:
    """See that a local folder can be written, or made; nothing is made yet. A remote one shows itself at the first write.

    Raises: UserError where it cannot.
    """
    if not folder:
        raise UserError("--root_dir is empty; a folder or URI is needed")
    if not is_local(folder):
        return
    nearest = Path(folder.removeprefix("file://")).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--root_dir {folder}: {nearest} is no folder that can be written")


def open_read(uri: str) -> IO[bytes]:
    """Open for reading.

    Raises: UserError where there is no such file or it may not be read.
    """
    with _reaching(uri):
        opened: IO[bytes] = fsspec.open(uri, "rb").open()
        return opened


def read_bytes(uri: str) -> bytes:
    """A whole file.

    Raises: UserError as `open_read`.
    """
    with open_read(uri) as file, _reaching(uri):
        return file.read()


def read_text(uri: str) -> str:
    """A whole file as UTF-8.

    Raises: UserError as `open_read`, or where it is no text.
    """
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is not a text file") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file or nothing: a reader sees the old content or the new, never a part.

    Local files go through a temporary file and a rename; a put to an object store is atomic by itself.
    """
    filesystem, path = _filesystem(uri)
    with _reaching(uri):
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


def remove(uri: str) -> None:
    """Remove a file if it is there.

    Raises: UserError where the store refuses.
    """
    filesystem, path = _filesystem(uri)
    with _reaching(uri):
        if filesystem.exists(path):
            filesystem.rm_file(path)


def list_files(uri: str) -> list[tuple[str, int]]:
    """All files under a folder as (path relative to it, bytes), sorted by path.

    Raises: UserError where there is no such folder.
    """
    filesystem, root = _filesystem(uri)
    with _reaching(uri):
        if not filesystem.isdir(root):
            raise UserError(f"no such folder: {uri}")
        root = root.rstrip("/")
        found = filesystem.find(root, detail=True)
    return sorted((path[len(root) + 1 :], int(info.get("size") or 0)) for path, info in found.items())


def glob_files(pattern: str) -> tuple[str, list[tuple[str, int]]]:
    """(folder before the first `*`, files as `list_files` gives them) of a pattern.

    Raises: UserError where the store cannot be reached.
    """
    filesystem, full = _filesystem(pattern)
    with _reaching(pattern):
        found = filesystem.glob(full, detail=True)
    root = posixpath.dirname(full.split("*")[0])
    files = sorted((path[len(root) + 1 :], int(info["size"])) for path, info in found.items())
    return posixpath.dirname(pattern.split("*")[0]), files


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 (hex, 32 characters) over length-prefixed parts: strings, or whatever has a contiguous buffer."""
    hasher = hashlib.sha256()
    for part in parts:
        data = memoryview(part.encode() if isinstance(part, str) else part).cast("B")
        hasher.update(data.nbytes.to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()[:32]
