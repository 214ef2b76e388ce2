"""Checkpoints that a run goes on from: everything that the next step depends on, in one safetensors file a step.

A file is written whole or not at all (`writing.create`) and checked by its size and digest when it is read, so the newest
complete one is found again whatever was being written. They lie in a folder that the run key names.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from patchsae_ray import storage
from patchsae_ray.backbone.weights import state_digest
from patchsae_ray.errors import NotFound, UserError
from patchsae_ray.pipelines.bundles import BadRows
from patchsae_ray.pipelines.claims import claim_of
from patchsae_ray.pipelines.heartbeat import driver_of
from patchsae_ray.writing import create, remove, write_bytes

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2
"""Checkpoints kept: the newest, and the one before it should the newest turn out damaged."""
_BAD_FILE = "bad.json"
Kind = Literal["step", "weights"]
"""A checkpoint to go on from, or the autoencoder alone (--n_checkpoints)."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read back."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    """What the steps before it showed, as plain values."""


@dataclass(frozen=True)
class ResumeFolder:
    """The checkpoints of one run.

    Args:
        uri: `resume` in the run's folder.
        key: the run key.
        identity: what the key is the digest of, kept in each file to name a difference.
    """

    uri: str
    key: str
    identity: Mapping[str, Any]

    @property
    def own(self) -> str:
        """The folder of this run key."""
        return storage.join(self.uri, self.key[:16])

    def save(
        self, step: int, tensors: Mapping[str, Tensor], kind: Kind = "step", notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write a checkpoint, then remove what is older than the one before it; of weights alone all are kept.

        Raises: StoreError once the store has stayed away for too long.
        """
        state = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": str(FORMAT),
            "key": self.key,
            "identity": json.dumps(dict(self.identity), sort_keys=True, default=str),
            "digest": state_digest(state),
            "notes": json.dumps(dict(notes or {})),
        }
        data = save_safetensors(state, metadata=metadata)
        uri = self._file(step, kind)
        if not storage.patiently(lambda: create(uri, data)) and _read(uri, self.key) is None:  # a damaged one is there
            storage.patiently(lambda: write_bytes(uri, data))
        if kind == "step":
            for old in self.steps()[:-KEPT]:
                storage.patiently(partial(remove, self._file(old, kind)))

    def steps(self, kind: Kind = "step") -> list[int]:
        """Steps of which there is a file, ascending."""
        names = [entry.path for entry in storage.patiently(lambda: storage.entries(self.own))]
        found = (re.fullmatch(rf"{kind}-(\d+)\.safetensors", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def _file(self, step: int, kind: Kind) -> str:
        return storage.join(self.own, f"{kind}-{step:012d}.safetensors")

    def newest(self, passed_over: Callable[[str], None] = log.warning) -> Saved | None:
        """The newest checkpoint that is whole.

        Args:
            passed_over: told a line of each that is not.
        """
        for step in reversed(self.steps()):
            saved = self.read(step)
            if saved is not None:
                return saved
            passed_over(f"{self._file(step, 'step')} is not whole: passed over")
        return None

    def read(self, step: int, kind: Kind = "step") -> Saved | None:
        """A checkpoint, None where it is not whole."""
        found = _read(self._file(step, kind), self.key)
        if found is None:
            return None
        tensors, metadata = found
        return Saved(step, tensors, json.loads(metadata["notes"]))

    def keep_bad(self, rows: BadRows) -> None:
        """Keep the list of unreadable images that were met, for a driver that goes on from here."""
        data = json.dumps(rows).encode()
        storage.patiently(lambda: write_bytes(storage.join(self.own, _BAD_FILE), data))

    def bad(self) -> BadRows:
        """Unreadable images that earlier drivers met."""
        uri = storage.join(self.own, _BAD_FILE)
        rows = json.loads(storage.read_text(uri)) if storage.exists(uri) else []
        return [(int(position), str(path), str(why)) for position, path, why in rows]

    def check(self) -> None:
        """Refuse a folder with another run's checkpoints and none of this one's.

        Raises: UserError that names the first difference.
        """
        found = [entry.path for entry in storage.entries(self.uri) if entry.path.endswith(".safetensors")]
        if not found or any(path.startswith(self.key[:16] + "/") for path in found):
            return
        raise UserError(
            f"{storage.join(self.uri, found[-1])} is a checkpoint of another run{self._difference(found[-1])}; "
            "--overwrite would remove it, another --run_name would keep both"
        )

    def _difference(self, path: str) -> str:
        uri = storage.join(self.uri, path)
        try:
            theirs = json.loads(_metadata(storage.read_bytes(uri)).get("identity", "{}"))
        except ValueError:
            return ""
        ours = json.loads(json.dumps(dict(self.identity), default=str))
        for name in ours:
            if theirs.get(name) != ours[name]:
                return f" ({name} {str(theirs.get(name, 'not said'))[:24]} there, {str(ours[name])[:24]} here)"
        return ""

    def clear(self) -> None:
        """Remove the checkpoints of every run of the folder; what says that a driver is at work on this one stays."""
        for entry in storage.patiently(lambda: storage.entries(self.uri)):
            key, _, name = entry.path.rpartition("/")
            at_work = driver_of(name) is not None or claim_of(name) is not None
            if key != self.key[:16] or not at_work:
                remove(storage.join(self.uri, entry.path))


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: dict[str, str] = header.get("__metadata__", {})
    return found


def _read(uri: str, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    try:
        data = storage.patiently(lambda: storage.read_bytes(uri))
        tensors, metadata = load_safetensors(data), _metadata(data)
    except (SafetensorError, ValueError, NotFound):  # not there: another driver has removed it
        return None
    whole = metadata.get("key") == key and metadata.get("digest") == state_digest(tensors)
    return (tensors, metadata) if whole else None


class AsyncWriter:
    """Writes copies of tensors on a thread of its own, one set at a time; the training step goes on meanwhile."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, write: Callable[[dict[str, Tensor]], None], tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, and have the copies written in the background; waits for what is being written.

        Raises: what writing that raised.
        """
        self.wait()
        copies = {name: torch.empty_like(tensor, device="cpu").copy_(tensor) for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._run, args=(write, copies), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises: what writing raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[dict[str, Tensor]], None], tensors: dict[str, Tensor]) -> None:
        try:
            write(tensors)
        except BaseException as error:
            self._error = error
