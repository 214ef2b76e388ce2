"""How a manifest is made: the work is cut into items, and whoever runs an item keeps the rows that it finds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.data.tables import ROWS_A_PART, Part
from patchsae_ray.writing import create, write_bytes

THREADS = 16
TASKS_FROM = 17
"""Items that are worth tasks; so many and fewer keep the threads of one process busy, which is there already."""


class TaskRunner(Protocol):
    """Runs a function for each of some items, several at once; both can be pickled."""

    def __call__(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """The results in the items' order, each as it is wanted."""
        ...


def on_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """A TaskRunner on threads of this process.

    Raises: StoreError once a store has stayed away for too long.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda item: storage.patiently(partial(work, item)), items)


@dataclass(frozen=True)
class Making:
    """Who makes a manifest's parts, and where they are left.

    Args:
        runner: of many items; few are done by threads of this process, and so are all without a runner.
        folder: where the runner's tasks write the parts, so that this process never holds all rows; for the digest of an
            image folder it reads them once more, a part at a time.
    """

    runner: TaskRunner | None = None
    folder: str = ""

    def run(self, work: Callable[..., Any], items: Sequence[Any]) -> Iterable[Any]:
        """`work` of each item, in order; it takes beside it the folder for its parts, or None to return them."""
        if self.runner is None or len(items) < TASKS_FROM:
            return on_threads(partial(work, folder=None), items)
        return self.runner(partial(work, folder=self.folder), items)


IN_THIS_PROCESS = Making()


def parts_of(rows: pa.Table, folder: str | None) -> tuple[Part, ...]:
    """Rows of IMAGE_SCHEMA as parts, written to the folder if there is one."""
    pieces = (Part.of(rows.slice(start, ROWS_A_PART)) for start in range(0, rows.num_rows, ROWS_A_PART))
    return tuple(piece if folder is None else kept_part(piece, folder) for piece in pieces)


def kept_part(part: Part, folder: str) -> Part:
    """A part as a file of the folder, named by its content, so that it is the same whoever writes it.

    Raises: UserError where the folder cannot be written, StoreError once its store has stayed away for too long.
    """
    if part.uri:
        return part
    return Part(part.count, uri=storage.patiently(partial(write_named, folder, part.data, ".part")))


def write_named(folder: str, data: bytes, extension: str) -> str:
    """Write a file whose name is the digest of its content. Returns its URI.

    Raises: UserError where the folder cannot be written, StoreError where the store does not answer.
    """
    uri = storage.join(folder, f"{storage.digest([data])}{extension}")
    if not create(uri, data) and storage.read_bytes(uri) != data:
        write_bytes(uri, data)  # its name is its digest: what is there is damaged
    return uri
