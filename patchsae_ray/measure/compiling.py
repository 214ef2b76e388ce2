"""Functions that torch's compiler makes faster where it can be had."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from patchsae_ray.errors import first_line

log = logging.getLogger(__name__)


class Compiled:
    """A function of one tensor that inductor compiles at its first call, for the shape of that call.

    Whether it can is a matter of the machine: inductor wants a C compiler, setuptools, on a GPU Triton. Where compiling fails,
    one warning says so, and the function runs as it is, with the same results. A failure after the first call is the
    function's own and raised.

    Args:
        function: with the same effect compiled or not, and free to be called twice.
        name: for the warning.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        self._function, self._name = function, name
        self._run: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x) if self._run is not None else self._first_call(x)

    def _first_call(self, x: Tensor) -> Tensor:
        try:
            compiled: Callable[[Tensor], Tensor] = torch.compile(self._function, dynamic=False)
            result = compiled(x)
            self._run = compiled
        except Exception as error:  # torch's compiler and what it starts raise many types
            result = self._function(x)  # where the function itself is at fault, this raises its own error
            self._run = self._function
            log.warning("%s runs without being compiled, more slowly: %s", self._name, _cause(error))
        return result


def _cause(error: Exception) -> str:
    """What went wrong, in one line: torch wraps the compiler's own error."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {first_line(inner)}"
