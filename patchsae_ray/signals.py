"""SIGTERM, with which Ray, Kubernetes and batch systems end a job: an interrupt, in the few seconds that they leave.

`ray job stop` kills what is still there after 3 s (RAY_JOB_STOP_WAIT_TIME_S makes it more), Kubernetes after 30 s. So what must
not be left out, the end of the MLflow run, begins at once on a thread of its own, while the main thread unwinds.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell says of a process that SIGTERM ended."""
LAST_SECONDS = 10.0
"""After which the process ends whatever its threads wait for."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. A KeyboardInterrupt, which Ray's own loops check for; they may raise a plain one in its place."""


class _Handler:
    """Raises Terminated in the main thread, once."""

    def __init__(self) -> None:
        self.received = False
        self.first: list[Callable[[], None]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return  # it is ending already
        self.received = True
        threading.Thread(target=self._end, name="sigterm", daemon=True).start()
        raise Terminated

    def _end(self) -> None:
        began = time.monotonic()
        for work in tuple(self.first):
            work()
        time.sleep(max(0.0, LAST_SECONDS - (time.monotonic() - began)))
        os._exit(EXIT_CODE)


_handler = _Handler()


def terminated() -> bool:
    """Whether SIGTERM has come."""
    return _handler.received


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it SIGTERM raises Terminated in the main thread, and the process ends LAST_SECONDS later at the latest."""
    before = signal.signal(signal.SIGTERM, _handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def handler_kept() -> Iterator[None]:
    """Put the handler of `sigterm_interrupts` back after what replaces it: `ray.init` sets one that ends with another code."""
    ours = signal.getsignal(signal.SIGTERM) is _handler
    yield
    if ours:
        signal.signal(signal.SIGTERM, _handler)


@contextmanager
def on_sigterm(work: Callable[[], None]) -> Iterator[None]:
    """Within it `work` is done as soon as SIGTERM comes, on a thread of its own."""
    _handler.first.append(work)
    try:
        yield
    finally:
        _handler.first.remove(work)
