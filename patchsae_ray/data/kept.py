"""Manifests that are made once per data set and kept under `{root_dir}/out/manifests`.

`{digest of it}.arrow` holds the units and never changes; `{source}.json` says which one a source has, and by what a change
of the source would show: the times of a local image folder's directories, the list of Parquet files or tars with versions.
A remote image folder has no such sign but its whole listing; its kept manifest is used until `--relist`.
"""

import io
import json
import logging
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.manifest import UNIT_SCHEMA, Keeping, Manifest, Reading, UnitTable
from patchsae_ray.data.sources import Listing, Source, list_source, manifest_of
from patchsae_ray.errors import UserError
from patchsae_ray.writing import create, write_bytes

log = logging.getLogger(__name__)

FORMAT = 1
SETTLING_SECONDS = 1.0
"""A directory changed more recently than this before it was listed may have changed while it was."""


@dataclass(frozen=True)
class Sign:
    """By what a change of a source shows."""

    kind: str
    """directories, files or none."""
    value: dict[str, int] | str
    """Directory → time of change in ns; the digest of the list of files; empty."""


def find_or_make(source: Source, root_dir: str, relist: bool) -> Manifest:
    """The manifest of a source: the kept one where the source has not changed, else made anew, for `keep`.

    Raises: UserError where there is nothing to be read.
    """
    folder = storage.absolute(storage.join(root_dir, "out", "manifests"))
    note_name = f"{storage.digest([json.dumps([FORMAT, *asdict(source).values()])])[:16]}.json"
    note_uri = storage.join(folder, note_name)
    if not relist and storage.exists(note_uri):
        note = json.loads(storage.read_text(note_uri))
        if _unchanged(source, Sign(**note["sign"])):
            log.info("manifest of %s kept since %s (--relist lists it anew)", source.uri, note["created"])
            return _load(storage.join(folder, note["manifest"]))
    started = time.time()
    listing = list_source(source)
    manifest = manifest_of(source, listing)
    sign = _sign(source, listing, started)
    content = None
    if sign is not None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"source": asdict(source), "created": created, "sign": asdict(sign)}
    return replace(manifest, keeping=Keeping(folder, note_name, content))


def keep(manifest: Manifest) -> Manifest:
    """Write a manifest that was just made, so that it is not made again; its units are read from the file from here on.

    Raises: UserError where the folder cannot be written.
    """
    keeping = manifest.keeping
    if keeping is None:
        return manifest
    data = _arrow_bytes(manifest)
    name = f"{storage.digest([data])}.arrow"
    uri = storage.join(keeping.folder, name)
    if not create(uri, data) and storage.read_bytes(uri) != data:
        write_bytes(uri, data)  # its name is its digest: what is there is damaged
    if keeping.content is not None:
        note = json.dumps({**keeping.content, "manifest": name}, indent=1) + "\n"
        write_bytes(storage.join(keeping.folder, keeping.note), note.encode())
    return replace(manifest, units=UnitTable(None, uri), keeping=None)


def _sign(source: Source, listing: Listing, started: float) -> Sign | None:
    """None where a change could go unseen: a directory that was still being written to."""
    if listing.format != "folder":
        return Sign("files", _files_digest(listing))
    if not storage.is_local(listing.root):
        return Sign("none", "")
    inside = {str(parent) for file in listing.files for parent in Path(file.path).parents}
    root = Path(listing.root.removeprefix("file://"))
    times = {str(root / path): (root / path).stat().st_mtime_ns for path in sorted({".", *inside})}
    return None if max(times.values()) > (started - SETTLING_SECONDS) * 1e9 else Sign("directories", times)


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
    return storage.digest([json.dumps(asdict(file)) for file in listing.files])


_PLAIN_FIELDS = [field.name for field in fields(Manifest) if field.name not in {"units", "reading", "keeping"}]


def _arrow_bytes(manifest: Manifest) -> bytes:
    said: dict[str, Any] = {name: getattr(manifest, name) for name in _PLAIN_FIELDS}
    said = {"format": FORMAT, **said, "reading": asdict(manifest.reading)}
    schema = UNIT_SCHEMA.with_metadata({"manifest": json.dumps(said)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in manifest.units.batches():
            writer.write_batch(batch)
    return buffer.getvalue()


def _load(uri: str) -> Manifest:
    """A kept manifest, its units read as they are wanted.

    Raises: UserError where the file is damaged or of another format.
    """
    try:
        with storage.open_read(uri) as opened:
            said = json.loads(pa.ipc.open_file(opened).schema.metadata[b"manifest"])
    except (pa.ArrowInvalid, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{uri} is not a whole manifest; --relist would make it again") from error
    if said["format"] != FORMAT:
        raise UserError(f"{uri}: format {said['format']}, expected {FORMAT}; --relist would make it again")
    reading: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said["reading"].items()
    }
    plain: dict[str, Any] = {name: tuple(said[name]) if isinstance(said[name], list) else said[name] for name in _PLAIN_FIELDS}
    return Manifest(units=UnitTable(None, uri), reading=Reading(**reading), **plain)
