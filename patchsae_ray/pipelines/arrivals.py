"""Blocks of a running Ray Data set, as they come, without waiting for them."""

import queue
import threading
from types import TracebackType
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

_here = threading.local()
"""Of a thread that executes a data set: `left`, set once nobody waits for it any more."""


class _EndWithPass(ExecutionCallback):
    """Ends an execution that was left; Ray makes one an execution, in the thread that begins it."""

    def __init__(self) -> None:
        self._left: threading.Event = _here.left

    def on_execution_step(self, executor: Any) -> None:
        if self._left.is_set():
            raise ExecutionTimeoutError("the pass has ended")  # the one kind that Ray prints no traceback of


class Arrivals:
    """References to a data set's blocks that have rows, pulled by a thread of its own: a pass can look around meanwhile.

    Leaving the `with` block ends the execution, whatever it is at, and waits for the thread: one that outlives its pass
    would go on asking Ray for blocks, and end the process once the pass's connection is closed.

    Args:
        data: a Ray Data set that nothing has executed yet.
        most: references that may wait here; more are not asked for, which holds the execution back. 0 for any number.
    """

    def __init__(self, data: Any, most: int = 0) -> None:
        self._arrived: queue.Queue[tuple[str, Any]] = queue.Queue(most)
        self._left = threading.Event()
        data.context.custom_execution_callback_classes = [*data.context.custom_execution_callback_classes, _EndWithPass]
        self._thread = threading.Thread(target=self._pull, args=(data,), daemon=True)

    def __enter__(self) -> "Arrivals":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join(timeout=60)

    def _pull(self, data: Any) -> None:
        _here.left = self._left
        try:
            for bundle in data.iter_internal_ref_bundles():
                for entry in bundle.blocks:
                    if entry.metadata.num_rows != 0:
                        self._put("block", entry.ref)
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, item: Any) -> None:
        while not self._left.is_set():
            try:
                self._arrived.put((kind, item), timeout=0.2)
                return
            except queue.Full:
                continue

    def next(self, timeout: float) -> Any:
        """The next reference; None where none comes within `timeout` seconds.

        Raises: StopIteration at the end; what the execution raised.
        """
        try:
            kind, item = self._arrived.get(timeout=timeout)
        except queue.Empty:
            return None
        if kind == "error":
            raise item
        if kind == "end":
            raise StopIteration
        return item
