"""Writing under any URI: whole files or nothing, commit once, update together with others."""

import fcntl
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchsae_ray.errors import StoreError, UserError
from patchsae_ray.storage import entries, filesystem_of, info, is_local, join, reaching, read_bytes

TEMPORARY_PREFIX = ".writing-"
"""Of local files that are not whole yet; a killed job leaves them, `--clean` removes them."""


def check_writable(folder: str) -> None:
    """See that a folder can be written, or made; nothing is made yet. Of an object store: that it answers, and has the bucket.

    Raises: UserError where it cannot.
    """
    if not folder:
        raise UserError("--root_dir is empty; a folder or URI is needed")
    if not is_local(folder):
        filesystem, path = filesystem_of(folder)
        bucket = path.lstrip("/").split("/")[0]
        with reaching(folder):
            filesystem.invalidate_cache()
            if "s3" in filesystem.protocol and bucket:
                filesystem.ls(bucket, detail=False)
        return
    nearest = Path(folder.removeprefix("file://")).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--root_dir {folder}: {nearest} is no folder that can be written")


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file or nothing: a reader sees the old content or the new, never a part.

    Local files go through a temporary file and a rename; a put to an object store is atomic by itself.
    """
    filesystem, path = filesystem_of(uri)
    with reaching(uri):
        if is_local(uri):
            with _temporary(Path(path), data) as temporary:
                temporary.replace(path)
        else:
            filesystem.pipe_file(path, data)


def create(uri: str, data: bytes) -> bool:
    """Write a whole file unless one is there: of several writers the first wins, and the content never changes after.

    Local files go through a temporary file and a hard link, which never replaces; S3 through a put with If-None-Match.

    Returns: whether this call wrote it.
    """
    filesystem, path = filesystem_of(uri)
    with reaching(uri):
        try:
            if is_local(uri):
                with _temporary(Path(path), data) as temporary:
                    os.link(temporary, path)
            else:
                filesystem.pipe_file(path, data, mode="create")
        except Exception as error:
            if isinstance(error, FileExistsError) or _condition_failed(error):
                return False
            raise
    return True


def update(uri: str, change: Callable[[bytes | None], bytes]) -> None:
    """Replace a small file by `change` of its content (None where there is no file), though others update it too.

    Local files are locked by their folder, S3 objects put with If-Match; another store has no such condition, and the last
    writer wins.

    Args:
        uri: the file.
        change: may be called again, with what another has written meanwhile.
    """
    filesystem, path = filesystem_of(uri)
    if is_local(uri):
        with reaching(uri), _locked(Path(path).parent):
            old = Path(path).read_bytes() if Path(path).exists() else None
            with _temporary(Path(path), change(old)) as temporary:
                temporary.replace(path)
        return
    for attempt in range(20):
        found = info(uri)
        old = read_bytes(uri) if found else None
        options: dict[str, Any] = {}
        if "s3" in filesystem.protocol:
            options = {"IfMatch": found["ETag"]} if found else {"mode": "create"}
        with reaching(uri):
            try:
                filesystem.pipe_file(path, change(old), **options)
                return
            except Exception as error:
                if not isinstance(error, FileExistsError) and not _condition_failed(error):
                    raise
        time.sleep(random.uniform(0, 0.1 * (attempt + 1)))
    raise StoreError(f"cannot write {uri}: others keep changing it")


def _condition_failed(error: BaseException) -> bool:
    """Whether S3 refused a put because of its condition; s3fs raises an OSError around the client's error."""
    cause: Any = error
    while cause is not None:
        code = getattr(cause, "response", {}).get("Error", {}).get("Code", "") if hasattr(cause, "response") else ""
        if str(code) in {"PreconditionFailed", "ConditionalRequestConflict", "412"}:
            return True
        cause = cause.__cause__
    return False


@contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """A whole, synced temporary file beside the target; gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f"{TEMPORARY_PREFIX}{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove(uri: str) -> None:
    """Remove a file if it is there.

    Raises: UserError where the store refuses.
    """
    filesystem, path = filesystem_of(uri)
    with reaching(uri):
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return


def remove_tree(uri: str) -> None:
    """Remove a folder and all that is in it, if it is there; what others remove meanwhile is no error.

    Raises: UserError where the store refuses.
    """
    for entry in entries(uri):
        remove(join(uri, entry.path))
    if is_local(uri):
        path = Path(uri.removeprefix("file://"))
        for folder in sorted((found for found in path.rglob("*") if found.is_dir()), reverse=True):
            _remove_empty(folder)
        _remove_empty(path)


def remove_empty(uri: str) -> None:
    """Remove a local folder if nothing is in it; object stores have no empty folders."""
    if is_local(uri):
        _remove_empty(Path(uri.removeprefix("file://")))


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # not empty, or not there: another writer's
