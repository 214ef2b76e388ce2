"""Blocks come as they are asked for: a pass that is slow holds the execution back, and one that ends leaves nothing running."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from patchsae_ray.pipelines.arrivals import Arrivals


class Data:
    """A data set's execution: gives blocks of so many rows, and counts those asked for."""

    def __init__(self, *rows: int) -> None:
        self.rows, self.asked = rows, 0
        self.context = SimpleNamespace(custom_execution_callback_classes=[])

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        for index, rows in enumerate(self.rows):
            self.asked += 1
            yield SimpleNamespace(blocks=[SimpleNamespace(ref=index, metadata=SimpleNamespace(num_rows=rows))])


def everything(arrivals: Arrivals) -> list[int]:
    found = []
    while True:
        try:
            one = arrivals.next(timeout=10)
        except StopIteration:
            return found
        found.append(one)


def test_blocks_without_rows_do_not_arrive() -> None:
    with Arrivals(Data(1, 0, 1, 0)) as arrivals:
        assert everything(arrivals) == [0, 2]


def test_no_more_is_asked_for_than_may_wait() -> None:
    data = Data(*(1,) * 50)
    with Arrivals(data, most=3) as arrivals:
        for taken in range(10):
            assert arrivals.next(timeout=10) == taken
            assert data.asked <= taken + 1 + 3 + 1, "what waits, and the one that is being put"
        assert everything(arrivals) == list(range(10, 50))


def test_leaving_early_ends_the_thread() -> None:
    before = set(threading.enumerate())
    with Arrivals(Data(*(1,) * 50), most=1) as arrivals:
        assert arrivals.next(timeout=10) == 0
    assert set(threading.enumerate()) == before


def test_what_the_execution_raises_is_raised() -> None:
    data = Data()
    data.iter_internal_ref_bundles = lambda: 1 / 0  # type: ignore[assignment,return-value,method-assign]
    with Arrivals(data) as arrivals, pytest.raises(ZeroDivisionError):
        arrivals.next(timeout=10)
