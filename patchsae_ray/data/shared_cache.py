"""A cache that threads share: bounded by bytes, and each thing is made once though several want it at the same time."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedCache(Generic[T]):
    """The things used last, by key.

    Args:
        limit: bytes of what is kept.
        weigh: bytes of one thing.
    """

    def __init__(self, limit: int, weigh: Callable[[T], int]) -> None:
        self._limit, self._weigh = limit, weigh
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._making: dict[Hashable, Future[T]] = {}
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under a key, or else what `make` gives; others that want it meanwhile wait for this call.

        Raises: whatever `make` or `weigh` raises, to all that wait; nothing is kept then.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            future = self._making.get(key)
            mine = future is None
            if future is None:
                future = self._making[key] = Future()
        if mine:
            self._make(key, make, future)
        return future.result()

    def _make(self, key: Hashable, make: Callable[[], T], future: "Future[T]") -> None:
        try:
            made = make()
            weight = self._weigh(made)
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            return
        with self._lock:
            del self._making[key]
            self._kept[key] = (made, weight)
            self._bytes += weight
            while self._bytes > self._limit:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        future.set_result(made)
