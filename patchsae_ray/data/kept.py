"""Manifests that are made once per data set and kept under `{root_dir}/out/manifests`.

`{digest of it}.arrow` says where the units begin and which files of `parts/` hold the rows and the labels; all of these are
named by their content and never change. `{source}.json` says which one a source has, and by what a change of the source
would show: the times of a local image folder's directories, the list of Parquet files or tars with versions. A remote image
folder has no such sign but its whole listing; its kept manifest is used until `--relist`.
"""

import io
import json
import logging
import posixpath
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.making import Making, TaskRunner, kept_part, write_named
from patchsae_ray.data.manifest import Keeping, Manifest, Reading
from patchsae_ray.data.sources import Listing, Source, list_source, manifest_of
from patchsae_ray.data.tables import Part, UnitTable
from patchsae_ray.errors import NotFound, UserError
from patchsae_ray.redaction import redacted, without_secrets
from patchsae_ray.writing import write_bytes

log = logging.getLogger(__name__)

FORMAT = 2
_NAMING = 1
"""Part of what a note is named by, so that notes of the first format are found, and replaced."""
SETTLING_SECONDS = 1.0
"""A directory changed more recently than this before it was listed may have changed while it was."""


@dataclass(frozen=True)
class Sign:
    """By what a change of a source shows."""

    kind: str
    """directories, files or none."""
    value: dict[str, int] | str
    """Directory → time of change in ns; the digest of the list of files; empty."""


@dataclass(frozen=True)
class Note:
    """What leads from a source to its kept manifest."""

    sign: Sign
    manifest: str
    """Its file's name."""
    created: str
    """When, in ISO 8601."""


def find_or_make(source: Source, root_dir: str, relist: bool, runner: TaskRunner | None = None) -> Manifest:
    """The manifest of a source: the kept one where the source has not changed, else made anew, for `keep`.

    A store that does not answer is said at once, as at the start of every job; once parts are made it is waited for.

    Args:
        source: the data set.
        root_dir: of the results.
        relist: make it anew in any case.
        runner: makes the parts of a large remote source, and has them written where they are kept; other sources, and all
            without a runner, are looked through by this process, and nothing is written yet.

    Raises: UserError where there is nothing to be read, StoreError where a store does not answer, or stays away for too long.
    """
    folder = storage.absolute(storage.join(root_dir, "out", "manifests"))
    note_name = f"{storage.digest([json.dumps([_NAMING, *asdict(source).values()])])[:16]}.json"
    kept = None if relist else _kept(source, folder, note_name)
    return kept or _made(source, folder, note_name, runner)


def _kept(source: Source, folder: str, note_name: str) -> Manifest | None:
    note_uri = storage.join(folder, note_name)
    if not storage.exists(note_uri):
        return None
    note = _note(note_uri, source)
    if note is None or not _unchanged(source, note.sign):
        return None
    try:
        manifest = _load(storage.join(folder, note.manifest))
        _expect_files(manifest, folder)
    except NotFound as error:
        log.warning("manifest of %s: the kept one is not whole (%s); it is made again", source.uri, error)
        return None
    log.info("manifest of %s kept since %s (--relist lists it anew)", source.uri, note.created)
    return manifest


def _note(uri: str, source: Source) -> Note | None:
    """None where it is of an older version, or damaged."""
    try:
        said = json.loads(storage.read_bytes(uri))
        if said.get("format") != FORMAT:
            log.info("manifest of %s: the kept one is of an older version; it is made again", source.uri)
            return None
        sign = Sign(**said["sign"])
        if isinstance(sign.value, dict) == (sign.kind == "directories"):
            return Note(sign, str(said["manifest"]), str(said["created"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    log.warning("manifest of %s: %s, which tells of the kept one, is damaged; it is made again", source.uri, uri)
    return None


def _expect_files(manifest: Manifest, folder: str) -> None:
    """Look whether the files are there that hold a kept manifest's rows and labels.

    Raises: NotFound where one is gone.
    """
    parts = _parts_folder(folder)
    there = {entry.path for entry in storage.entries(parts)}
    for uri in (*(part.uri for part in manifest.units.parts), str(manifest.units.label_source)):
        if posixpath.basename(uri) not in there:
            raise NotFound(f"no such file: {uri}")


def _made(source: Source, folder: str, note_name: str, runner: TaskRunner | None) -> Manifest:
    making = Making(None if storage.is_local(source.uri) else runner, _parts_folder(folder))
    started = time.time()
    listing = list_source(source, making)
    manifest = manifest_of(source, listing, making)
    sign = _sign(source, listing, started)
    content = None
    if sign is not None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"format": FORMAT, "source": without_secrets(asdict(source)), "created": created, "sign": asdict(sign)}
    return replace(manifest, keeping=Keeping(folder, note_name, content))


def _parts_folder(folder: str) -> str:
    return storage.join(folder, "parts")


def keep(manifest: Manifest) -> Manifest:
    """Write a manifest that was just made, so that it is not made again; its rows are read from files from here on.

    Raises: UserError where the folder cannot be written, StoreError once its store has stayed away for too long.
    """
    keeping = manifest.keeping
    return manifest if keeping is None else storage.patiently(partial(_keep, manifest, keeping))


def _keep(manifest: Manifest, keeping: Keeping) -> Manifest:
    folder = _parts_folder(keeping.folder)
    with ThreadPoolExecutor(storage.READING_THREADS) as pool:
        parts = tuple(pool.map(lambda part: kept_part(part, folder), manifest.units.parts))
    labels = write_named(folder, np.ascontiguousarray(manifest.units.labels(), "<i4").tobytes(), ".labels")
    units = replace(manifest.units, parts=parts, label_source=labels)
    name = posixpath.basename(write_named(keeping.folder, _index_bytes(replace(manifest, units=units)), ".arrow"))
    if keeping.content is not None:
        note = json.dumps({**keeping.content, "manifest": name}, indent=1) + "\n"
        write_bytes(storage.join(keeping.folder, keeping.note), note.encode())
    return replace(manifest, units=units, keeping=None)


def wanted_files(folder: str, notes: Iterable[str]) -> set[str]:
    """The files of a folder of manifests that its notes lead to, relative to it.

    Raises: UserError where a note or a manifest is damaged, so that it cannot be told.
    """
    wanted: set[str] = set()
    for note in notes:
        try:
            name = str(json.loads(storage.read_bytes(storage.join(folder, note)))["manifest"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{storage.join(folder, note)} is damaged; --relist would make it again") from error
        try:
            units = _load(storage.join(folder, name)).units
        except NotFound:
            continue
        uris = [*(part.uri for part in units.parts), str(units.label_source)]
        wanted |= {note, name, *(f"parts/{posixpath.basename(uri)}" for uri in uris)}
    return wanted


def _sign(source: Source, listing: Listing, started: float) -> Sign | None:
    """None where a change could go unseen: a directory that was still being written to."""
    if listing.format != "folder":
        return Sign("files", _files_digest(listing))
    if not storage.is_local(listing.root):
        return Sign("none", "")
    times = listing.directories
    return None if not times or max(times.values()) > (started - SETTLING_SECONDS) * 1e9 else Sign("directories", times)


def _unchanged(source: Source, sign: Sign) -> bool:
    if sign.kind == "files":
        return _files_digest(list_source(source)) == sign.value
    if sign.kind == "none":
        return True
    assert isinstance(sign.value, dict)
    try:
        return all(Path(path).stat().st_mtime_ns == when for path, when in sign.value.items())
    except OSError:
        return False


def _files_digest(listing: Listing) -> str:
    return storage.digest([json.dumps(asdict(file)) for file in listing.archives])


_PLAIN_FIELDS = [field.name for field in fields(Manifest) if field.name not in {"units", "reading", "keeping"}]


def _index_bytes(manifest: Manifest) -> bytes:
    """Where the units and the row groups begin, as batches of a column, and all else of a manifest in the schema's metadata."""
    said: dict[str, Any] = {name: getattr(manifest, name) for name in _PLAIN_FIELDS}
    said["source"] = redacted(manifest.source)
    said["reading"] = asdict(manifest.reading)
    said["parts"] = [[posixpath.basename(part.uri), part.count] for part in manifest.units.parts]
    said["labels"] = posixpath.basename(str(manifest.units.label_source))
    schema = pa.schema([("edge", pa.int64())]).with_metadata({"manifest": json.dumps(said)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for edges in (manifest.units.edges(), manifest.units.group_edges()):
            writer.write_batch(pa.record_batch([pa.array(edges, pa.int64())], schema=schema))
    return buffer.getvalue()


def _load(uri: str) -> Manifest:
    """A kept manifest, its rows read as they are wanted.

    Raises: UserError where the file is damaged.
    """
    data = storage.read_bytes(uri)
    try:
        return _parsed(data, _parts_folder(posixpath.dirname(uri)))
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{uri} is not a whole manifest; --relist would make it again") from error


def _parsed(data: bytes, folder: str) -> Manifest:
    reader = pa.ipc.open_file(pa.BufferReader(data))
    said = json.loads(reader.schema.metadata[b"manifest"])
    edges, groups = (reader.get_batch(number).column("edge").to_numpy() for number in (0, 1))
    parts = tuple(Part(count, uri=storage.join(folder, name)) for name, count in said["parts"])
    reading: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said["reading"].items()
    }
    plain: dict[str, Any] = {name: tuple(said[name]) if isinstance(said[name], list) else said[name] for name in _PLAIN_FIELDS}
    units = UnitTable(parts, edges, storage.join(folder, said["labels"]), groups)
    return Manifest(units=units, reading=Reading(**reading), **plain)
