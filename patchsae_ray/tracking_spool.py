"""What a results folder keeps of its MLflow run: which run it is, and what could not be logged yet.

Both lie in `mlflow/` beside the results until the run is finished and all of it is logged: `run-<key>.json` names the run, so
that the same command goes on in it; `spool-<key>-<time>.jsonl` are lines of entries, each file written whole and once.
"""

import json
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from patchsae_ray import storage
from patchsae_ray.errors import StoreError, UserError
from patchsae_ray.writing import create, remove, remove_empty, write_bytes

log = logging.getLogger(__name__)

FOLDER = "mlflow"
FLUSH_SECONDS = 30.0
"""How often entries that wait in memory are written: what a process that is killed can lose."""
MOST_HELD = 50_000
"""Entries that wait in memory while the results folder cannot be written; older ones are then dropped."""


def now() -> int:
    """Milliseconds since 1970, MLflow's time."""
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Entry:
    """Something to be logged, at one time; a line of a spool."""

    time: int
    """Milliseconds since 1970."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    """Of the metrics."""
    file: str = ""
    """A result file in the folder, to be copied as an artifact."""
    status: str = ""
    """The run's end: FINISHED, FAILED or KILLED."""

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value or name == "time"})

    @classmethod
    def from_json(cls, line: str) -> "Entry":
        """Raises: ValueError where the line is none of ours."""
        values = json.loads(line)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Place:
    """Where a run keeps what concerns MLflow.

    Args:
        folder: the results folder, local or a URI.
        key: the run key.
    """

    folder: str
    key: str

    @property
    def uri(self) -> str:
        return storage.join(self.folder, FOLDER)

    @property
    def note(self) -> str:
        """URI of the file that names the MLflow run."""
        return storage.join(self.uri, f"run-{self.key[:8]}.json")

    def pieces(self) -> list[str]:
        """URIs of the spool's files, oldest first."""
        names = [entry.path for entry in storage.entries(self.uri)]
        return [storage.join(self.uri, name) for name in sorted(names) if name.startswith(f"spool-{self.key[:8]}-")]

    def run_id(self) -> str | None:
        """The MLflow run that an earlier start of this run has opened."""
        if not storage.exists(self.note):
            return None
        try:
            said: Any = json.loads(storage.read_bytes(self.note))
        except ValueError:
            return None
        found = said.get("run_id") if isinstance(said, dict) else None
        return found if isinstance(found, str) else None

    def keep_run_id(self, run_id: str, instead_of: str | None) -> str:
        """Keep which MLflow run this is. Returns that of another driver which was faster, else `run_id`.

        Args:
            run_id: the MLflow run.
            instead_of: what was kept so far, and is there no longer.
        """
        data = (json.dumps({"run_id": run_id}) + "\n").encode()
        if instead_of is not None:
            write_bytes(self.note, data)
            return run_id
        return run_id if create(self.note, data) else self.run_id() or run_id

    def remove(self, piece: str) -> None:
        """Remove a file of the spool, which is logged."""
        remove(piece)
        remove_empty(self.uri)

    def forget(self) -> None:
        """The run is finished and logged: another start of it would be another MLflow run."""
        remove(self.note)
        remove_empty(self.uri)


class Spool:
    """The entries that wait: in memory at first, then in files of the results folder."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.held: list[Entry] = []
        """Those that are in no file yet."""
        self._written = time.monotonic()

    def read(self, piece: str) -> list[Entry]:
        """The entries of a file, none where another driver has removed it; lines that are none of ours are passed over.

        Raises: StoreError where the store does not answer.
        """
        try:
            data = storage.read_bytes(piece)
        except StoreError:
            raise
        except UserError:
            return []
        entries = []
        for line in data.decode(errors="replace").splitlines():
            try:
                entries.append(Entry.from_json(line))
            except ValueError:
                log.warning("%s: a line is no entry for MLflow: passed over", piece)
        return entries

    def write(self, entries: Sequence[Entry]) -> None:
        """Write entries into a file of their own.

        Raises: UserError where the store does not take it.
        """
        if entries:
            name = f"spool-{self._place.key[:8]}-{time.time_ns():020d}-{secrets.token_hex(4)}.jsonl"
            create(storage.join(self._place.uri, name), "".join(f"{entry.to_json()}\n" for entry in entries).encode())

    def flush(self, after: float = FLUSH_SECONDS) -> None:
        """Write what has waited in memory for so many seconds; what cannot be written goes on waiting."""
        if not self.held or time.monotonic() - self._written < after:
            return
        self._written = time.monotonic()
        kept = len(self.held)
        try:
            self.write(self.held)
        except UserError as error:
            log.warning("MLflow: %s", error)
            kept = max(0, kept - MOST_HELD)
        del self.held[:kept]
