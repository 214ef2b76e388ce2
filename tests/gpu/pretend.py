"""A GPU for machines without one: tensors that say they are on `cuda`, computed on the CPU.

Under `pretended_cuda` a tensor that is made on the device `cuda`, or moved there, is a CPU tensor of a class that says so, and
so is whatever comes of it. Operands on two devices are the error that a GPU would raise, CPU scalars, indices and copies apart.
So the package's branches for CUDA are taken, with numbers, and a tensor that was left on the CPU is found. Streams, events and
pinned memory are stand-ins without effect. What a kernel for a GPU computes, and whether there is one, only a GPU shows.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda", 0)
_MIXES = (Tensor.copy_, Tensor.to, Tensor.type_as, torch._has_compatible_shallow_copy_type)
_ABOUT_DEVICES = (torch.device, torch._C._nn._parse_to)
_INDEXES = (Tensor.__getitem__, Tensor.__setitem__)
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Pretending(TorchFunctionMode):
    """Catches what makes tensors on `cuda` from none, or from the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """A function on the CPU; what it makes is on the pretended GPU where the real one's would be."""
    if func in _ABOUT_DEVICES:
        return func(*args, **kwargs)
    flat, _ = tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, Tensor)]
    there = [one for one in tensors if _on_gpu(one)]
    if there and func == Tensor.device.__get__:  # type: ignore[attr-defined]
        return CUDA
    if there and func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
        return True
    if there and func in _TO_NUMPY:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first.")
    if there and func not in _MIXES:
        _check_devices(func, tensors, args)
    asked = _device_asked_for(func, args, kwargs)
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    args, kwargs = tree_map_only(str, lambda text: "cpu" if text.startswith("cuda") else text, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    on_gpu = bool(there) if asked is None else asked == "cuda"
    return tree_map_only(Tensor, lambda one: _placed(one, on_gpu, asked is not None), out)


def _device_asked_for(func: Any, args: Any, kwargs: Any) -> str | None:
    if func is Tensor.cpu:
        return "cpu"
    if func is Tensor.cuda:
        return "cuda"
    if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
        return "cuda" if isinstance(args[1], PretendedTensor) else "cpu"
    named = [kwargs.get("device"), *(args[1:2] if func is Tensor.to else ())]
    found = [torch.device(one).type for one in named if isinstance(one, (str, torch.device))]
    return found[0] if found else None


def _on_gpu(tensor: Tensor) -> bool:
    return isinstance(tensor, PretendedTensor) or hasattr(tensor, "pretended")


def _placed(tensor: Tensor, on_gpu: bool, moved: bool) -> Tensor:
    if on_gpu == _on_gpu(tensor):
        return tensor
    if on_gpu and tensor.layout != torch.strided:  # sparse tensors take no class of ours, but a note
        tensor.pretended = True  # type: ignore[attr-defined]
        return tensor
    if on_gpu:
        return tensor.as_subclass(PretendedTensor)
    return tensor.as_subclass(Tensor) if moved else tensor


def _check_devices(func: Any, tensors: list[Tensor], args: Any) -> None:
    """Raises: RuntimeError where operands are on two devices and a GPU would not take them."""
    for one in tensors:
        index = func in _INDEXES and one is not args[0]
        if not _on_gpu(one) and one.ndim and not index:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")


class _Stream:
    """A stream that everything is on."""

    def wait_stream(self, other: "_Stream") -> None:
        pass


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _entered(_: Any) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def pretended_cuda(free_bytes: int = 80 * 2**30) -> Iterator[None]:
    """Makes `cuda` a device of this process: see the module.

    Args:
        free_bytes: what it says of its memory.
    """
    stream = _Stream()
    replaced: dict[str, Any] = {
        "torch.cuda.synchronize": _nothing,
        "torch.cuda.current_stream": lambda *_: stream,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.stream": _entered,
        "torch.cuda.mem_get_info": lambda *_: (free_bytes, free_bytes),
        "torch.cuda.memory_reserved": lambda *_: 0,
        "torch.cuda.memory_allocated": lambda *_: 0,
        "torch.Tensor.pin_memory": lambda tensor, *_: tensor,
        "torch.Tensor.is_pinned": lambda *_: True,
        "torch.Tensor.record_stream": _nothing,
    }
    patches = [mock.patch(target, value) for target, value in replaced.items()]
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's class is part of its place here
    for patch in patches:
        patch.start()
    try:
        with _Pretending():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
        for patch in patches:
            patch.stop()
