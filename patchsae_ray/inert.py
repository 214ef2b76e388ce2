"""Checkpoints from elsewhere, read without running anything of theirs.

torch's `weights_only` unpickler builds tensors and plain values; every other class that a file names, if it is expected at
all, becomes an inert stand-in. Nothing is imported and nothing is called.
"""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from patchsae_ray.errors import UserError, first_line

MAX_SHARING = 2
"""Bytes of a checkpoint's tensors over bytes of its file; more than 1 where tensors share their numbers."""
_PACKED_BYTES = 16 * 2**20
"""That an archive may unpack to beyond its own size; torch compresses no tensor."""


_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""What a file of torch before 1.6 begins with, which is no archive."""


class StandIn:
    """What an object of a foreign class becomes: its attributes, where it has plain ones, and nothing else."""

    def __new__(cls, *arguments: Any, **options: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Arguments are dropped."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    """What a defaultdict becomes: torch's unpickler fills plain dicts alone."""
    return {}


_MADE_PLAIN = {"collections.defaultdict": _plain_dict}


def check_size(path: str, source: io.BytesIO | Path, held: int) -> None:
    """See that a checkpoint, if it is a zip archive, unpacks to about the bytes that it holds.

    Args:
        path: for the message.
        source: the file.
        held: its bytes.

    Raises: UserError where it would unpack to more.
    """
    if not zipfile.is_zipfile(source):
        return
    try:
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is not a whole torch checkpoint: {first_line(error)}") from error
    if unpacked > held + _PACKED_BYTES:
        raise UserError(f"{path} unpacks to {unpacked:,} bytes from {held:,}; torch itself stores tensors uncompressed")


def check_claims(path: str, loaded: Any, held: int) -> None:
    """See that a checkpoint's tensors take about the bytes that its file holds: one number, repeated, takes any size.

    Args:
        path: for the message.
        loaded: the checkpoint's content.
        held: the file's bytes.

    Raises: UserError where they would take more.
    """
    claimed, waiting, seen = 0, [loaded], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            claimed += value.numel() * value.element_size()
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
        elif isinstance(value, (dict, StandIn)):
            waiting.extend((value if isinstance(value, dict) else vars(value)).values())
    if claimed > MAX_SHARING * held:
        raise UserError(f"{path} claims tensors of {claimed:,} bytes in {held:,}")


def check_tensor(path: str, name: str, value: torch.Tensor) -> None:
    """See that a tensor is real numbers that lie in memory one by one.

    Args:
        path: of its file, for the message.
        name: for the message.
        value: the tensor.

    Raises: UserError where it is sparse, nested, quantised, complex, or without numbers of its own (meta).
    """
    plain = value.layout == torch.strided and not value.is_nested and value.is_cpu
    if not plain or value.is_quantized or value.is_complex():
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise UserError(f"{path}: {name} is no plain tensor of real numbers ({kind}); save it as a dense one, on the CPU")


def load_inert(path: str, data: bytes, expected: Callable[[str], bool], what: str) -> Any:
    """A torch checkpoint's content, objects of expected classes as stand-ins.

    Args:
        path: for the messages.
        data: the file's bytes.
        expected: whether a class, by its full name, may be in the file.
        what: what is read of such a file, for the message.

    Raises: UserError where the file is damaged, claims more than it holds, or names a class that is not expected.
    """
    if data.startswith(_OLD_FORMAT):
        raise UserError(f"{path} is saved in torch's old format; load it with torch and save it again")
    check_size(path, io.BytesIO(data), len(data))
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(f"{path} is not a whole torch checkpoint: {first_line(error)}") from error
    foreign = [name for name in named if not expected(name)]
    if foreign:
        raise UserError(f"{path} would run {foreign[0]} when unpickled; only {what} are read")
    try:
        with (
            torch.serialization.safe_globals([(_MADE_PLAIN.get(name, StandIn), name) for name in named]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", UserWarning)  # torch's own, of odd tensors
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = error.__context__ or error  # torch wraps what went wrong in advice
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(reason)}") from error
    check_claims(path, loaded, len(data))
    return loaded
