"""An iterator that works ahead of who takes from it."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class prefetched(Iterator[T], Generic[T]):
    """`items`, made on a thread of its own and up to `most` ahead.

    Args:
        items: what is made.
        most: how many may wait.
    """

    def __init__(self, items: Iterator[T], most: int) -> None:
        self._items = items
        self._made: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=most)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, what: tuple[str, object]) -> bool:
        while not self._left.is_set():
            try:
                self._made.put(what, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        kind, item = self._made.get()
        if kind == "error":
            raise item  # type: ignore[misc]
        if kind == "end":
            raise StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop making, and wait for the thread."""
        self._left.set()
        self._thread.join(timeout=60)
