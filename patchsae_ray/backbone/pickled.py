"""The pickle in a TorchScript archive → a tree of modules and tensors, without Python's pickle machinery.

An interpreter of those opcodes that torch's own pickler writes (torch/csrc/jit/serialization/pickler.cpp). A global is
kept as a name and never looked up; what `REDUCE` would call is one of a few names that stand for plain values. A name or
an opcode that is not expected ends the reading.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any

import torch

_DTYPES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
_OWN_CLASS = "__torch__."
_TENSOR = "torch._utils._rebuild_tensor_v2"
_FIRST_ARGUMENT = frozenset(
    f"torch.jit._pickle.{name}"
    for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
) | {"torch._utils._rebuild_parameter", "torch.device"}
"""What these give is their first argument, as far as tensors are concerned."""
_EMPTY_DICT = "collections.OrderedDict"
_KNOWN = frozenset({*_DTYPES, *_FIRST_ARGUMENT, _TENSOR, _EMPTY_DICT})

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = frozenset({"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(ValueError):
    """The file holds what is not read; the message continues a line that begins with the file's name."""


@dataclass(frozen=True)
class Storage:
    """Numbers in a record of the archive."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor's place in its storage, within the storage's bounds."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class PickledModule:
    """An object of one of the archive's own classes."""

    kind: str
    """The class's full name, `__torch__.…`."""
    attributes: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    """A global, which is not looked up."""

    name: str


def read_tree(data: bytes) -> PickledModule:
    """The module that a TorchScript archive's `data.pkl` describes.

    Raises: Refused for whatever torch would not have written for a module of tensors, or would run on loading; ValueError,
        IndexError, KeyError or TypeError where the pickle makes no sense.
    """
    stack = _Stack()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            break
        stack.step(opcode.name, argument)
    root = stack.values[-1]
    if not isinstance(root, PickledModule):
        raise Refused(f"holds {type(root).__name__} where its module should be")
    return root


class _Stack:
    """The pickle machine's state: a stack, the marks in it, and the memo."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """One opcode.

        Raises: Refused where it is none of those that torch's pickler writes.
        """
        if opcode in _CONSTANTS:
            self.values.append(_CONSTANTS[opcode])
        elif opcode in _VALUES:
            self.values.append(argument)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.values[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.values.append(self._memo[argument])
        elif opcode == "GLOBAL":
            self.values.append(_name(argument))
        elif opcode == "MARK":
            self._marks.append(len(self.values))
        elif opcode != "PROTO":
            self._combine(opcode)

    def _combine(self, opcode: str) -> None:
        """The opcodes that take values from the stack."""
        match opcode:
            case "EMPTY_LIST":
                self.values.append([])
            case "EMPTY_DICT":
                self.values.append({})
            case "TUPLE":
                self.values.append(tuple(self._to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.values.append(self._take(_TUPLES[opcode]))
            case "APPEND" | "APPENDS":
                items = self._to_mark() if opcode == "APPENDS" else self._take(1)
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._to_mark() if opcode == "SETITEMS" else self._take(2)
                if not all(isinstance(key, (str, int, float)) for key in items[::2]):
                    raise Refused("holds a mapping whose keys are neither text nor numbers")
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                self.values.append(_storage(*self._take(1)))
            case "NEWOBJ" | "REDUCE":
                self.values.append(_made(*self._take(2)))
            case "BUILD":
                (state,) = self._take(1)
                _build(self._top(PickledModule), state)
            case _:
                raise Refused(f"holds the pickle opcode {opcode}, which TorchScript does not write")

    def _top(self, kind: type) -> Any:
        if not isinstance(self.values[-1], kind):
            raise Refused(f"would change a {type(self.values[-1]).__name__} when unpickled")
        return self.values[-1]

    def _take(self, count: int) -> tuple[Any, ...]:
        if len(self.values) < count:
            raise IndexError("its pickle takes more values than it has")
        taken = tuple(self.values[-count:])
        del self.values[-count:]
        return taken

    def _to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        taken = self.values[mark:]
        del self.values[mark:]
        return taken


def _name(argument: str) -> _Name:
    name = argument.replace(" ", ".")
    if not name.startswith(_OWN_CLASS) and name not in _KNOWN:
        raise Refused(f"would run {name} when unpickled")
    return _Name(name)


def _made(function: Any, arguments: Any) -> Any:
    """What an object's making or a function's call stands for."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise Refused(f"would call a {type(function).__name__} when unpickled")
    if function.name.startswith(_OWN_CLASS):
        return PickledModule(function.name)
    if function.name in _FIRST_ARGUMENT:
        return arguments[0]
    if function.name == _EMPTY_DICT:
        return {}
    if function.name == _TENSOR:
        return _tensor(*arguments[:4])
    raise Refused(f"would call {function.name} when unpickled")


def _build(module: PickledModule, state: Any) -> None:
    if not isinstance(state, dict):
        raise Refused(f"would run {module.kind}.__setstate__ when loaded")
    module.attributes.update(state)


def _storage(identifier: Any) -> Storage:
    kind, dtype, key, _, numel = identifier
    if kind != "storage" or not isinstance(dtype, _Name) or dtype.name not in _DTYPES or not isinstance(key, str):
        raise Refused("refers to something that is no storage of numbers")
    return Storage(key, _DTYPES[dtype.name], *_sizes((numel,)))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> PickledTensor:
    if not isinstance(storage, Storage):
        raise Refused("holds a tensor without a storage")
    (start,), shape, steps = _sizes((offset,)), _sizes(size), _sizes(stride)
    last = start + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if all(shape) and last >= storage.numel:
        raise Refused(f"claims a tensor that ends at {last + 1:,} of the {storage.numel:,} numbers of {storage.key}")
    return PickledTensor(storage, start, shape, steps)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise Refused("gives a size that is no whole number from 0")
    return values
