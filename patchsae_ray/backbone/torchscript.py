"""TorchScript archives, the form of OpenAI's CLIP weights, read as tensors alone.

An archive is a zip. `NAME/data.pkl` is the tree of modules as a pickle, `NAME/data/KEY` the numbers of one storage, and
`NAME/code/` the source of the modules' classes, which `torch.jit.load` runs: a `__setstate__` in it does what it likes.
Here the source only tells by its `__parameters__` and `__buffers__` which tensors belong to a state dict, and the pickle
is read by `pickled.read_tree`, which has nothing to call.
"""

import re
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from patchsae_ray.backbone.pickled import PickledModule, PickledTensor, Refused, Storage, read_tree
from patchsae_ray.errors import UserError, first_line
from patchsae_ray.inert import MAX_SHARING

MAX_PICKLE_BYTES = 4 * 2**20
"""Of `data.pkl`; that of CLIP's largest archives has a tenth of it."""
_MAX_CODE_BYTES = 16 * 2**20
_MAX_ATTRIBUTES, _MAX_DEPTH, _MAX_NAME = 100_000, 32, 256

_CLASS = re.compile(r"^class (\w+)\(Module\):$")
_MEMBERS = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$")


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with `constants.pkl`, which `torch.save` does not write."""
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def read_torchscript(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of an archive's module, on the CPU; none of its code is run.

    Raises: UserError that names the file where it is cut short, claims more than it holds, or is more than a tree of
        modules with tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _state_dict(archive, file.stat().st_size)
    except Refused as error:
        raise UserError(f"{file} {error}; of a TorchScript archive only modules and their tensors are read") from error
    except Exception as error:  # zipfile, and a pickle that makes no sense, raise many types
        raise UserError(f"{file} is not a whole TorchScript archive: {first_line(error)}") from error


def _state_dict(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, torch.Tensor]:
    records = {info.filename: info for info in archive.infolist()}
    top = next(name for name in records if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    if f"{top}byteorder" in records and _text(archive, records[f"{top}byteorder"], 16) != b"little":
        raise Refused("was written on a big-endian machine")
    root = read_tree(_text(archive, records[f"{top}data.pkl"], MAX_PICKLE_BYTES))
    tensors = dict(_named_tensors(root, _members(archive, f"{top}code/")))
    claimed = sum(prod(tensor.size) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if claimed > MAX_SHARING * file_bytes:
        raise Refused(f"claims tensors of {claimed:,} bytes in {file_bytes:,}")
    storages = {tensor.storage: _numbers(archive, records, top, tensor.storage) for tensor in tensors.values()}
    return {
        name: torch.as_strided(storages[tensor.storage], tensor.size, tensor.stride, tensor.offset)
        for name, tensor in tensors.items()
    }


def _text(archive: zipfile.ZipFile, record: zipfile.ZipInfo, limit: int) -> bytes:
    """A record's bytes, of which there may be `limit`, however well they are compressed."""
    with archive.open(record) as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"holds {record.filename} of more than {limit:,} bytes")
    return data


def _members(archive: zipfile.ZipFile, code: str) -> dict[str, set[str]]:
    """Class name → names of its parameters and buffers, as the archive's source lists them."""
    found: dict[str, set[str]] = {}
    left = _MAX_CODE_BYTES
    for record in archive.infolist():
        if not record.filename.startswith(code) or not record.filename.endswith(".py"):
            continue
        source = _text(archive, record, left)
        left -= len(source)
        module = record.filename.removeprefix(code).removesuffix(".py").replace("/", ".")
        members: set[str] = set()
        for line in source.decode().splitlines():
            if header := _CLASS.match(line):
                members = found.setdefault(f"{module}.{header[1]}", set())
            elif listed := _MEMBERS.match(line):
                members.update(re.findall(r'"([^"]*)"', listed[1]))
    return found


def _named_tensors(root: PickledModule, members: dict[str, set[str]]) -> Iterator[tuple[str, PickledTensor]]:
    """Dotted name → tensor for each parameter and buffer, a module's before its submodules'."""
    waiting = [("", root, 0)]
    attributes = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        attributes += len(module.attributes)
        if attributes > _MAX_ATTRIBUTES or depth > _MAX_DEPTH:
            raise Refused("holds modules within modules without end")
        wanted = members.get(module.kind)
        for name, value in module.attributes.items():
            if not isinstance(name, str) or len(name) > _MAX_NAME:
                raise Refused(f"holds an attribute that is not named by text of at most {_MAX_NAME} characters")
            if isinstance(value, PickledModule):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
            elif isinstance(value, PickledTensor) and (wanted is None or name in wanted):
                yield prefix + name, value


def _numbers(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], top: str, storage: Storage) -> torch.Tensor:
    """A storage's numbers [n]. Torch never compresses them, so that a record is as large as the file has bytes for."""
    record = records[f"{top}data/{storage.key}"]
    if record.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"holds {record.filename} compressed, as torch does not write it")
    if record.file_size != storage.numel * storage.dtype.itemsize:
        raise Refused(f"claims {storage.numel:,} numbers of {storage.dtype} in {record.file_size:,} bytes")
    if not storage.numel:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(archive.read(record)), dtype=storage.dtype)
