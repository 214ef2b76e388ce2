"""What dead runs have left under a root folder: bundles, checkpoints and manifests that no result needs, unfinished files."""

import logging
import posixpath
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from patchsae_ray import storage
from patchsae_ray.data.kept import wanted_files
from patchsae_ray.errors import StoreError, UserError
from patchsae_ray.pipelines.bundles import bundle_units
from patchsae_ray.pipelines.claims import claim_of
from patchsae_ray.pipelines.given_up import failed_of
from patchsae_ray.pipelines.heartbeat import driver_of
from patchsae_ray.writing import TEMPORARY_PREFIX, check_writable, remove, remove_empty, write_bytes

log = logging.getLogger(__name__)

DEAD_AFTER_SECONDS = 600.0
"""A run whose folder nothing was written to for this long is dead: a live driver writes its heartbeat every ten seconds."""
UNUSED_AFTER_SECONDS = 86_400.0
"""What has no heartbeat, checkpoints and manifests, may be in use for this long after it was last written."""
RESULT_FOLDERS = ("out", "eval_outputs")
MANIFESTS = "out/manifests"
_RUN_KEY = re.compile(r"[0-9a-f]{16}")
"""Of a run's folder of checkpoints."""
_CHECKPOINT = re.compile(r"(?:step|weights)-\d{12}\.safetensors|bad\.json")
_MANIFEST = re.compile(r"(?:parts/)?[0-9a-f]{32}\.(?:arrow|part|labels)|[0-9a-f]{16}\.json")
"""Of kept manifests, below their folder; whatever has another name is the user's."""


@dataclass(frozen=True)
class Leftover:
    """What a dead run has left: a folder, a file, or an upload that did not end."""

    uri: str
    what: str
    size: int
    """Bytes."""
    age: float
    """Seconds since something was written to it, by the store's clock."""
    dead_after: float
    """Seconds after which it can be no live run's."""
    remove: Callable[[], None]

    def describe(self) -> str:
        return f"{self.uri}: {self.what}, {self.size / 2**20:,.1f} MiB, last written {self.age / 60:,.0f} minutes ago"


@dataclass(frozen=True)
class _File:
    path: str
    """Relative to the root folder."""
    size: int
    written: float
    """Seconds since 1970, by the store's clock."""

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.path)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def kind(self) -> str:
        """The name of the folder above the file's."""
        return posixpath.basename(posixpath.dirname(self.folder))


def clean(root_dir: str) -> dict[str, float]:
    """`jobs/extract.py --clean`: list what dead runs have left under `root_dir`, and remove it.

    A run is dead where nothing was written to its folder for ten minutes, a training where nothing was for a day; younger
    ones are listed and left.

    Raises: UserError where the root cannot be reached or written.
    """
    check_writable(root_dir)
    removed = kept = 0
    size = 0
    for leftover in find_leftovers(root_dir):
        if leftover.age < leftover.dead_after:
            log.info("clean: kept, may be in use: %s", leftover.describe())
            kept += 1
            continue
        leftover.remove()
        log.info("clean: removed %s", leftover.describe())
        removed, size = removed + 1, size + leftover.size
    log.info("clean: %d leftovers removed (%.1f MiB), %d kept, under %s", removed, size / 2**20, kept, root_dir)
    return {"removed": float(removed), "removed_bytes": float(size), "kept": float(kept)}


def find_leftovers(root_dir: str) -> list[Leftover]:
    """Of every kind, under the root's result folders.

    Raises: UserError where the root cannot be reached or written.
    """
    files = [file for top in RESULT_FOLDERS for file in _listed(root_dir, top)]
    uploads = _uploads(root_dir)
    if not files and not uploads:
        return []
    now = _store_time(root_dir)
    runs = list(_folders(root_dir, files, now))
    found = [*runs, *_unfinished(root_dir, files, now), *(_upload(root_dir, upload, now) for upload in uploads)]
    if any(run.age < run.dead_after for run in runs):
        log.info("clean: manifests are kept, for a run may be using them")
        return found
    return [*found, *_manifests(root_dir, files, now)]


def _listed(root_dir: str, top: str) -> list[_File]:
    """All files under a folder of the root, with the times that the store gives them; empty where there is no such folder."""
    filesystem, root = storage.filesystem_of(root_dir)
    with storage.reaching(root_dir):
        filesystem.invalidate_cache()
        listed = filesystem.find(posixpath.join(root, top), detail=True)
    root = root.rstrip("/")
    found = []
    for name, said in sorted(listed.items()):
        path = name[len(root) + 1 :]
        written = _seconds(said) or storage.modified(storage.join(root_dir, path))
        found.append(_File(path, int(said.get("size") or 0), written))
    return found


def _seconds(said: dict[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "last_modified", "updated"):
        value = said.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def _store_time(root_dir: str) -> float:
    """What time it is by the store's clock, which need not be this machine's: when a file that is written now was written."""
    uri = storage.join(root_dir, RESULT_FOLDERS[0], f"{TEMPORARY_PREFIX}time-{secrets.token_hex(4)}")
    write_bytes(uri, b"")
    try:
        return storage.modified(uri)
    finally:
        remove(uri)


def _folders(root_dir: str, files: Iterable[_File], now: float) -> Iterator[Leftover]:
    """Bundles of runs, and checkpoints to go on from, by the run that they belong to."""
    runs: dict[str, list[_File]] = {}
    for file in files:
        if _is_of_a_run(file):
            runs.setdefault(file.folder, []).append(file)
    for folder, inside in sorted(runs.items()):
        units = {unit for file in inside for unit in bundle_units(file.name) or ()}
        of_a_pass = inside[0].kind == "bundles"
        what = f"{len(inside)} files of {len(units)} units" if of_a_pass else f"{len(inside)} files to resume a training from"
        age = now - max(file.written for file in inside)
        uri, uris = storage.join(root_dir, folder), [storage.join(root_dir, file.path) for file in inside]
        limit = DEAD_AFTER_SECONDS if of_a_pass else UNUSED_AFTER_SECONDS
        yield Leftover(uri, what, sum(file.size for file in inside), age, limit, partial(_remove_files, uri, uris))


def _is_of_a_run(file: _File) -> bool:
    """Whether it is a run's bundle or checkpoint, or what its driver writes beside these; another's file never is."""
    if file.kind == "bundles":
        ours = bundle_units(file.name) is not None or failed_of(file.name) is not None
    elif file.kind == "resume" and _RUN_KEY.fullmatch(posixpath.basename(file.folder)):
        ours = _CHECKPOINT.fullmatch(file.name) is not None
    else:
        return False
    beside = claim_of(file.name) is not None or driver_of(file.name) is not None
    return ours or beside or file.name.startswith(TEMPORARY_PREFIX)


def _remove_files(folder: str, uris: list[str]) -> None:
    """The files, one by one, then their folder and the one above it where nothing else is in them."""
    with ThreadPoolExecutor(storage.READING_THREADS) as pool:
        list(pool.map(remove, uris))
    remove_empty(folder)
    remove_empty(posixpath.dirname(folder))


def _unfinished(root_dir: str, files: Iterable[_File], now: float) -> Iterator[Leftover]:
    for file in files:
        if file.name.startswith(TEMPORARY_PREFIX) and not _is_of_a_run(file):
            uri = storage.join(root_dir, file.path)
            yield Leftover(uri, "unfinished file", file.size, now - file.written, DEAD_AFTER_SECONDS, partial(remove, uri))


def _manifests(root_dir: str, files: Iterable[_File], now: float) -> Iterator[Leftover]:
    """Manifests of data sets that have changed since, and parts of manifests: what no note of a source leads to."""
    below = f"{MANIFESTS}/"
    inside = [file for file in files if file.path.startswith(below) and _MANIFEST.fullmatch(file.path.removeprefix(below))]
    notes = [file.path.removeprefix(MANIFESTS + "/") for file in inside if file.name.endswith(".json")]
    try:
        current = {*wanted_files(storage.join(root_dir, MANIFESTS), notes), *notes}
    except StoreError:
        raise
    except UserError as error:
        log.info("clean: manifests are kept: %s", error)
        return
    for file in inside:
        if file.path.removeprefix(MANIFESTS + "/") not in current and not file.name.startswith(TEMPORARY_PREFIX):
            uri, age = storage.join(root_dir, file.path), now - file.written
            yield Leftover(uri, "of a manifest that is not current", file.size, age, UNUSED_AFTER_SECONDS, partial(remove, uri))


def _uploads(root_dir: str) -> list[dict[str, Any]]:
    """Uploads in parts that have begun under the root and not ended, as S3 lists them: they are paid for, and no file."""
    filesystem, path = storage.filesystem_of(root_dir)
    if not hasattr(filesystem, "list_multipart_uploads"):
        return []
    bucket, _, prefix = path.strip("/").partition("/")
    try:
        with storage.reaching(root_dir):
            listed = filesystem.list_multipart_uploads(bucket)
    except UserError as error:
        log.info("clean: uploads that did not end are not listed: %s", error)
        return []
    tops = tuple(posixpath.join(prefix, top) + "/" for top in RESULT_FOLDERS)
    return [upload for upload in listed if str(upload["Key"]).startswith(tops)]


def _upload(root_dir: str, upload: dict[str, Any], now: float) -> Leftover:
    filesystem, path = storage.filesystem_of(root_dir)
    bucket = path.strip("/").split("/")[0]

    def abort() -> None:
        with storage.reaching(root_dir):
            filesystem.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    age = now - upload["Initiated"].timestamp()
    return Leftover(f"s3://{bucket}/{upload['Key']}", "upload that did not end", 0, age, UNUSED_AFTER_SECONDS, abort)
