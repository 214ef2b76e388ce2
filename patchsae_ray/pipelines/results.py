"""A results folder: which run made each file, what is done already, what must not be overwritten.

run.json holds `files` (name → run key, digest, job) and `runs` (job → its record). It is updated before the files, with
what is about to be written under `pending` and by whom under `begun`, and again after them; so a killed job leaves nothing
that looks finished. Each update is made on what is there at that moment, and looks again whether the folder has become
another run's: so jobs which end together lose nothing of each other's, whichever began first.
"""

import hashlib
import json
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from patchsae_ray import __version__, storage
from patchsae_ray.errors import UserError
from patchsae_ray.writing import remove, update, write_bytes

FORMAT = 1
RUN_FILE = "run.json"
READ_BACK_BYTES = 64 * 2**20
"""Files up to this size are read again before a run is declared finished; of larger ones the size is compared."""


def run_key(identity: Mapping[str, Any]) -> str:
    """The digest of everything that a result depends on."""
    return storage.digest([json.dumps({"format": FORMAT, **identity}, sort_keys=True)])


@dataclass
class ResultFolder:
    """The folder of one run's results.

    Args:
        uri: local folder or URI.
        job: train, extract, class_latents, steer or compare.
        identity: what the results depend on; its digest is the run key.
        outputs: file name → the key that it must carry to be this run's (the run key, or that of a part of it).
        elsewhere: the flags that would put another run's results into another folder; empty where none would.
    """

    uri: str
    job: str
    identity: Mapping[str, Any]
    outputs: Mapping[str, str]
    elsewhere: str = "--root_dir or --dataset_name"
    _state: dict[str, Any] = field(default_factory=dict)
    _written: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File name → its entry, of what this run has written so far."""
    _overwrite: bool = False
    """Whether another run's results may be replaced, as `check` was told."""

    def __post_init__(self) -> None:
        self._state = read_run_file(self.uri)

    @property
    def key(self) -> str:
        """The run key."""
        return run_key(self.identity)

    def done(self) -> bool:
        """Whether every output is there, under its key and as large as it was written."""
        for name, key in self.outputs.items():
            entry, uri = self._entry(name), storage.join(self.uri, name)
            if entry is None or entry["key"] != key or not storage.exists(uri) or storage.size(uri) != entry["bytes"]:
                return False
        return True

    def describe_done(self) -> str:
        """When a run that is `done` was finished, and where."""
        finished_at = datetime.fromtimestamp(storage.modified(storage.join(self.uri, RUN_FILE)), UTC)
        return f"already finished ({RUN_FILE} of {finished_at:%Y-%m-%d}); results in {self.uri}"

    def record(self) -> dict[str, Any]:
        """The record of this very run where this job made it, else that of the run that made the first output."""
        runs = self._state["runs"]
        own = runs.get(self.job)
        if own and own["run_key"] == self.key:
            return dict(own)
        return dict(runs[self._state["files"][next(iter(self.outputs))]["job"]])

    def check(self, overwrite: bool) -> None:
        """Refuse a folder that holds another run's results, as it is now; writing and committing will look again.

        Raises: UserError unless `overwrite`.
        """
        self._overwrite = overwrite
        self._state = storage.patiently(lambda: read_run_file(self.uri))
        if not overwrite:
            self._refuse_others(self._state, self._is_there)

    def _refuse_others(self, state: Mapping[str, Any], there: Callable[[str], bool]) -> None:
        """See that no output is another run's.

        Args:
            state: run.json.
            there: whether a file is there, of one that run.json does not know.

        Raises: UserError that names the first, and what differs.
        """
        known, pending = state.get("files", {}), state.get("pending", {})
        for name, key in self.outputs.items():
            whose = known[name]["key"] if name in known else pending.get(name)
            if whose == key or (whose is None and not there(name)):
                continue
            keeps = f", another {self.elsewhere} would keep both" if self.elsewhere else ""
            said = self._difference(state, name)
            raise UserError(f"{storage.join(self.uri, name)} is another run's ({said}); --overwrite would replace it{keeps}")

    def _is_there(self, name: str) -> bool:
        return storage.patiently(lambda: storage.exists(storage.join(self.uri, name)))

    def _entry(self, name: str) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = self._state.get("files", {}).get(name)
        return entry

    def _difference(self, state: Mapping[str, Any], name: str) -> str:
        entry = state.get("files", {}).get(name)
        if entry is not None:
            job, record = entry["job"], state.get("runs", {}).get(entry["job"])
        else:
            begun = state.get("begun", {})
            job = next((job for job, one in begun.items() if name in one["outputs"]), None)
            record = begun.get(job)
        if record is None:
            return "run.json says nothing of it"
        theirs = record.get("identity", {})
        differing = [key for key in self.identity if key in theirs and theirs[key] != self.identity[key]]
        made = f"made by {job}" if entry is not None else f"begun by {job}"
        if not differing:
            return made
        key = differing[0]
        return f"{key} {_short(theirs[key])} there, {_short(self.identity[key])} here"

    def done_meanwhile(self) -> bool:
        """Whether another driver has finished this very run since it was looked at."""

        def look() -> bool:
            self._state = read_run_file(self.uri)
            return self.done()

        return storage.patiently(look)

    def write(self, name: str, data: bytes) -> None:
        """Write one output. It counts once the run is committed; until then it is this run's unfinished business.

        Raises: UserError where the folder has become another run's, whose file is left as it is.
        """
        if name not in self.outputs:
            raise ValueError(f"{name} is not among the outputs announced")
        if not self._written:
            self._begin()
        self._refuse_taken()
        storage.patiently(lambda: write_bytes(storage.join(self.uri, name), data))
        self._written[name] = {
            "key": self.outputs[name],
            "job": self.job,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def _begin(self) -> None:
        """Say what is about to be written; where others' is to be replaced, what this job wrote under another key goes.

        Raises: UserError where the folder has become another run's since it was checked, unless that may be replaced.
        """
        stale: set[str] = set()

        def change(state: dict[str, Any]) -> dict[str, Any]:
            known: dict[str, Any] = dict(state.get("files", {}))
            runs = dict(state.get("runs", {}))
            if self._overwrite:
                gone = {name for name, entry in known.items() if entry["job"] == self.job and name not in self.outputs}
                stale.update(gone)  # of each call: one that sees its own result finds nothing
                replaced = [name for name, key in self.outputs.items() if name in known and known[name]["key"] != key]
                for name in [*gone, *replaced]:
                    known.pop(name)
                if runs.get(self.job, {}).get("run_key") != self.key:
                    runs.pop(self.job, None)
            else:
                self._refuse_others(state, lambda _: False)
            mine = {"run_key": self.key, "identity": dict(self.identity), "outputs": sorted(self.outputs)}
            pending, begun = {**state.get("pending", {}), **self.outputs}, {**state.get("begun", {}), self.job: mine}
            return {"files": known, "runs": runs, "pending": pending, "begun": begun}

        self._update(change)
        for name in sorted(stale.difference(self._state["files"], self._state["pending"])):
            remove(storage.join(self.uri, name))

    def _refuse_taken(self) -> None:
        """See that the folder, as it is now, is still this run's to write to.

        Raises: UserError where another run has taken it with --overwrite since this one began.
        """
        self._refuse_others(storage.patiently(lambda: read_run_file(self.uri)), lambda _: True)

    def _refuse_changed(self) -> None:
        """See that the files are still those that this run wrote.

        Raises: UserError that names the first which is not.
        """
        for name, entry in self._written.items():
            uri = storage.join(self.uri, name)
            if not storage.patiently(partial(_is_as_written, uri, entry)):
                raise UserError(f"{uri} was written by another run since; the same command makes it again")

    def commit(self, record: Mapping[str, Any]) -> None:
        """Declare the run finished; every output must have been written. What other jobs committed meanwhile stays.

        Raises: UserError where another run has taken the folder with --overwrite since this one began to write, or has written
            to one of its files.
        """
        missing = set(self.outputs) - set(self._written)
        if missing:
            raise ValueError(f"not written: {', '.join(sorted(missing))}")
        self._refuse_taken()
        self._refuse_changed()
        made = {"run_key": self.key, "identity": dict(self.identity), **record}

        def change(state: dict[str, Any]) -> dict[str, Any]:
            self._refuse_others(state, lambda _: True)
            pending = {name: key for name, key in state.get("pending", {}).items() if name not in self.outputs}
            begun = {job: one for job, one in state.get("begun", {}).items() if job != self.job}
            files, runs = {**state.get("files", {}), **self._written}, {**state.get("runs", {}), self.job: made}
            return {"files": files, "runs": runs, "pending": pending, "begun": begun}

        self._update(change)

    def _update(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        uri = storage.join(self.uri, RUN_FILE)

        def changed(data: bytes | None) -> bytes:
            self._state = {"format": FORMAT, "version": __version__, **change(_parse(data, uri))}
            return (json.dumps(self._state, indent=1, sort_keys=True, default=str) + "\n").encode()

        storage.patiently(lambda: update(uri, changed))


def _is_as_written(uri: str, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there with the size, and unless it is large with the digest, of its entry in run.json."""
    found = storage.info(uri)
    if found is None or found["size"] != entry["bytes"]:
        return False
    return entry["bytes"] > READ_BACK_BYTES or hashlib.sha256(storage.read_bytes(uri)).hexdigest() == entry["sha256"]


def finished(folders: Mapping[str, ResultFolder], overwrite: bool) -> ResultFolder | None:
    """The folder, seen as the run of one precision, that is done already; None where there is work to do.

    `--precision auto` is known only once the cluster is, and a finished run must be seen without starting Ray: so each
    precision that it may mean has its own run key here.

    Raises: UserError where the folder holds another run's results, unless `overwrite`.
    """
    refused: list[UserError] = []
    for folder in folders.values():
        if folder.done():
            return folder
        try:
            folder.check(overwrite)
        except UserError as error:
            refused.append(error)
    if len(refused) == len(folders):
        raise refused[0]
    return None


def read_run_file(folder: str) -> dict[str, Any]:
    """run.json of a folder, empty where there is none.

    Raises: UserError where it is damaged or of a later format.
    """
    uri = storage.join(folder, RUN_FILE)
    return _parse(storage.read_bytes(uri) if storage.exists(uri) else None, uri)


def _read_ours(folder: str) -> dict[str, Any]:
    """run.json of a folder, empty where it is not one of ours: beside files from elsewhere it may be anything."""
    uri = storage.join(folder, RUN_FILE)
    data = storage.read_bytes(uri) if storage.exists(uri) else b"{}"
    try:
        state = json.loads(data)
    except ValueError:
        return {}
    ours = isinstance(state, dict) and isinstance(state.get("format"), int) and "runs" in state
    return _parse(data, uri) if ours else {}


def _parse(data: bytes | None, uri: str) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        state = json.loads(data)
    except ValueError as error:
        raise UserError(f"{uri} is not JSON: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{uri}: format {state.get('format') if isinstance(state, dict) else '?'}, expected {FORMAT}")
    return state


def record_of_file(uri: str) -> dict[str, Any] | None:
    """The record of the run that made a file, by the run.json beside it; None where nothing is said of it."""
    folder, name = posixpath.split(uri)
    state = _read_ours(folder or ".")
    entry = state.get("files", {}).get(name)
    record = state.get("runs", {}).get(entry["job"]) if entry else None
    return dict(record) if record else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
