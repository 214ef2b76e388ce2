"""Writing under any URI: whole files or nothing, commit once, update together with others."""

import errno
import logging
import os
import posixpath
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from patchsae_ray.errors import NotFound, StoreError, UserError
from patchsae_ray.faults import of_code, reaching, s3_code
from patchsae_ray.filesystems import READING_THREADS, filesystem_of, is_local
from patchsae_ray.storage import entries, exists, info, join, read_bytes

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".writing-"
"""Of local files that are not whole yet; a killed job leaves them, `--clean` removes them."""
_LOCK_SECONDS = 60.0
_TRIES = 20
_UNMET = {"If-None-Match": {"mode": "create"}, "If-Match": {"IfMatch": f'"{32 * "0"}"'}}
"""Header → condition that does not hold for an object which is there: `create` relies on the one, `update` on the other."""


def check_writable(folder: str) -> None:
    """See that whole files can be made, never replaced, and locked, under a folder; what is tried with is removed again.

    The folder itself is not made. On an object store a small object is made under it and removed, so that an identity needs no
    rights but those to list, put, get and delete below `folder`. Where new files are not safe from other writers, a line
    says so.

    Raises: UserError where it cannot be written, or no file be locked; AccessError where the store refuses the credentials;
        StoreError where it does not answer, or there is no such bucket.
    """
    if not folder:
        raise UserError("--root_dir is empty; a folder or URI is needed")
    if not is_local(folder):
        _probe_store(folder)
        return
    nearest = Path(folder.removeprefix("file://")).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--root_dir {folder}: {nearest} is no folder that can be written")
    with reaching(str(nearest)), _temporary(nearest / "probe", b"") as temporary:
        _probe_lock(folder, temporary)
        linked = temporary.with_suffix(".link")
        if _link(temporary, linked):
            linked.unlink()
        else:
            log.warning(
                "%s has no hard links: new files are made under a lock, which two machines share only where the file system "
                "passes flock on (SMB does, gcsfuse does not)",
                nearest,
            )


def _probe_lock(folder: str, file: Path) -> None:
    try:
        with _lock_on(file):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise UserError(
            f"--root_dir {folder}: files in {file.parent} cannot be locked ({error.strerror}); a file system with flock is "
            "needed (on NFSv3: lockd and statd on client and server)"
        ) from error


def _probe_store(folder: str) -> None:
    filesystem, path = filesystem_of(join(folder, f"{TEMPORARY_PREFIX}probe-{secrets.token_hex(8)}"))
    is_s3 = "s3" in filesystem.protocol
    with reaching(folder):
        if is_s3:  # a put alone would make the bucket on some servers
            bucket, key, _ = filesystem.split_path(path)
            prefix = posixpath.dirname(key)
            filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix and f"{prefix}/", MaxKeys=1)
        _put(filesystem, path, b"1", mode="create")
        for header, condition in _UNMET.items() if is_s3 else ():
            if _put(filesystem, path, b"2", **condition):
                log.warning("%s: this store ignores conditional writes (%s): run one job at a time on it", folder, header)
        filesystem.rm_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file or nothing: a reader sees the old content or the new, never a part.

    Local files go through a temporary file and a rename; a put to an object store is atomic by itself.

    Raises: as `reaching`.
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

    Local files go through a temporary file and a hard link, which never replaces and which NFS servers decide. A file system
    without hard links: under the folder's lock, by a rename. S3: by a put with If-None-Match.

    Returns: whether the file now holds `data`. That is so too where an earlier try wrote it whose answer was lost, and where
        another writer wrote the same bytes: a writer who must know which it was puts something of its own into them.

    Raises: as `reaching`.
    """
    filesystem, path = filesystem_of(uri)
    for _ in range(_TRIES):
        with reaching(uri):
            if is_local(uri):
                with _temporary(Path(path), data) as temporary:
                    done = _place(temporary, Path(path))
            else:
                done = _put(filesystem, path, data, mode="create")
        if done:
            return True
        try:
            return read_bytes(uri) == data
        except NotFound:
            continue  # removed in the meantime
    raise StoreError(f"cannot write {uri}: others keep making and removing it")


def update(uri: str, change: Callable[[bytes | None], bytes]) -> None:
    """Replace a small file by `change` of its content (None where there is no file), though others update it too.

    Local files are locked by a file beside their folder (flock; NFS passes it on to the server, unless mounted with `nolock`
    or `local_lock`). S3 objects are put with If-Match. Another store has no such condition, and the last writer wins.

    Args:
        uri: the file.
        change: may be called again, with what another has written meanwhile, or with its own result where a put was done
            though its answer was lost: there it must change nothing. What it raises is passed on.

    Raises: as `reaching`.
    """
    filesystem, path = filesystem_of(uri)
    if is_local(uri):
        with _locked(Path(path).parent):
            write_bytes(uri, change(read_bytes(uri) if exists(uri) else None))
        return
    for attempt in range(_TRIES):
        found = info(uri)
        old = read_bytes(uri) if found else None
        new = change(old)
        condition: dict[str, Any] = {}
        if "s3" in filesystem.protocol:
            condition = {"IfMatch": found["ETag"]} if found else {"mode": "create"}
        with reaching(uri):
            if new == old or _put(filesystem, path, new, **condition):
                return
        _pause(attempt)
    raise StoreError(f"cannot write {uri}: others keep changing it")


def _put(filesystem: Any, path: str, data: bytes, **condition: str) -> bool:
    """Put an object. Returns whether it was done; not where its condition does not hold.

    S3 answers 409 where another conditional put of the same object is under way, which may yet fail: tried again.
    """
    for attempt in range(_TRIES):
        try:
            filesystem.pipe_file(path, data, **condition)
            return True
        except Exception as error:
            code = s3_code(error)
            gone = isinstance(error, FileNotFoundError) and "IfMatch" in condition
            if isinstance(error, FileExistsError) or gone or code in ("PreconditionFailed", "412"):
                return False
            if code not in ("ConditionalRequestConflict", "409"):
                raise
        _pause(attempt)
    raise OSError("others keep writing it")


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.1 * (attempt + 1)))


def _place(source: Path, target: Path) -> bool:
    """Give a file its name unless that is taken. Returns whether that was done."""
    try:
        if _link(source, target):
            return True
    except FileExistsError:
        return False
    with _locked(target.parent):
        if target.exists():
            return False
        source.replace(target)
        return True


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name. Returns False where the file system has no hard links.

    Raises: FileExistsError where the name is taken.
    """
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return False
    return True


@contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """A whole, synced temporary file beside the target; gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:  # with the rights that the process's umask leaves
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one writer of a folder at a time, by flock on `.NAME.lock` beside the folder NAME; a killed one lets go.

    A regular file, since NFS passes on no lock of a folder; it stays, since to remove it would let two in at once.
    """
    lock = _lock_on(folder.with_name(f".{folder.name}.lock"))
    with reaching(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock_on(file: Path) -> FileLock:
    """By flock or not at all: a lock by the file's mere existence would outlive a killed writer."""
    return FileLock(file, timeout=_LOCK_SECONDS, fallback_to_soft=False)


def remove(uri: str) -> None:
    """Remove a file if it is there.

    Raises: AccessError where the store refuses, StoreError where it does not answer.
    """
    filesystem, path = filesystem_of(uri)
    with reaching(uri):
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return


def remove_tree(uri: str, keep: str | None = None) -> None:
    """Remove a folder and all that is in it, if it is there; what others remove meanwhile is no error.

    On S3 a request removes up to 1,000 objects.

    Args:
        uri: the folder.
        keep: a folder in it that stays, with all that is in that.

    Raises: AccessError or StoreError that names the first file that could not be removed.
    """
    files = [join(uri, entry.path) for entry in entries(uri) if keep is None or not entry.path.startswith(f"{keep}/")]
    if is_local(uri):
        for file in files:
            remove(file)
        path = Path(uri.removeprefix("file://"))
        for folder in sorted((found for found in path.rglob("*") if found.is_dir()), reverse=True):
            _remove_empty(folder)
        _remove_empty(path)
    elif "s3" in filesystem_of(uri)[0].protocol:
        for start in range(0, len(files), 1000):
            _remove_objects(files[start : start + 1000])
    else:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            list(pool.map(remove, files))


def _remove_objects(uris: Sequence[str]) -> None:
    """Remove up to 1,000 objects of a bucket; s3fs's own `rm` would not say which could not be removed."""
    filesystem, _ = filesystem_of(uris[0])
    places = [filesystem.split_path(filesystem_of(uri)[1]) for uri in uris]
    wanted = {"Objects": [{"Key": key} for _, key, _ in places], "Quiet": True}
    with reaching(uris[0]):
        answer = filesystem.call_s3("delete_objects", Bucket=places[0][0], Delete=wanted)
    failed = [one for one in answer.get("Errors", []) if one.get("Code") != "NoSuchKey"]
    if failed:
        first = failed[0]
        raise of_code(first.get("Code", ""))(
            f"cannot remove {len(failed)} files, the first s3://{places[0][0]}/{first.get('Key')}: {first.get('Message')}"
        )


def remove_empty(uri: str) -> None:
    """Remove a local folder if nothing is in it; object stores have no empty folders."""
    if is_local(uri):
        _remove_empty(Path(uri.removeprefix("file://")))


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # not empty, or not there: another writer's
