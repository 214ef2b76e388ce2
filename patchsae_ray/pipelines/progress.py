"""What is done and being tried, and one line at a time about it: images done, images/s, time left."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable
from types import TracebackType
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

FIRST_LINE_SECONDS = 3.0
LINE_SECONDS = 10.0
QUIET_SECONDS = 60.0
"""Without progress for this long, the line says so."""
REPORT_SECONDS = 1.0


class Attempts:
    """Attempts at a piece of work, a unit or a chunk, that have begun and not ended.

    A piece is begun before it is worked on and ended after. An attempt that never ended has taken its process with it, or
    its process went with its node: a node that is lost, or taken back by its cloud, says nothing against the piece.

    Args:
        alive: gives the ids of the nodes that are alive.
    """

    def __init__(self, alive: Callable[[], Collection[str]] | None = None) -> None:
        self._alive = alive or nodes_alive
        self._open: dict[tuple[str, Hashable], list[str]] = {}

    def begin(self, stage: str, key: Hashable, node: str) -> int:
        """Note an attempt. Returns the deaths: earlier attempts that never ended, on nodes that are still alive.

        Args:
            stage: decode or model.
            key: of the piece; nothing else may be tried under it at the same time.
            node: id of the node of the attempt.
        """
        earlier = self._open.setdefault((stage, key), [])
        if earlier:
            alive = self._alive()
            earlier[:] = [one for one in earlier if one in alive]
        deaths = len(earlier)
        earlier.append(node)
        return deaths

    def end(self, stage: str, key: Hashable, node: str) -> None:
        """One attempt on that node ended, well or with an error; the deaths of others stay on record."""
        nodes = self._open.get((stage, key), [])
        if node in nodes:
            nodes.remove(node)
        if not nodes:
            self._open.pop((stage, key), None)


def nodes_alive() -> set[str]:
    """Ids of the cluster's nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class Ledger(Attempts):
    """Images done in each unit, reported from inside the units.

    Args:
        num_units: of the data set.
    """

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self._finished = np.zeros(num_units, dtype=bool)
        self._finished_images = 0
        self._in_flight: dict[int, int] = {}

    def report(self, unit: int, images: int, final: bool) -> None:
        """`images` of a unit are done; a unit that is done again counts once."""
        if self._finished[unit]:
            return
        if final:
            self._finished[unit] = True
            self._in_flight.pop(unit, None)
            self._finished_images += images
        else:
            self._in_flight[unit] = max(images, self._in_flight.get(unit, 0))

    def total(self) -> int:
        """Images done."""
        return self._finished_images + sum(self._in_flight.values())


def start_ledger(num_units: int) -> Any:
    """A ledger as an actor on the driver's own machine, so that it lives as long as the driver."""
    return ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=on_this_machine()).remote(num_units)


def on_this_machine() -> NodeAffinitySchedulingStrategy:
    """Where the driver runs, and nowhere else."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Reporter:
    """An actor's side of the ledger: at most one report a second, and one at the end of each unit."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self._last = 0.0

    def report(self, unit: int, images: int, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._last >= REPORT_SECONDS:
            self._ledger.report.remote(unit, images, final)
            self._last = now


class ProgressLines:
    """Logs a line every ten seconds while the `with` block runs, and knows how long nothing has moved.

    Args:
        what: the job's name in the line.
        total: images of the data set.
        before: images that were done before.
        ledger: the actor that knows.
        publish: is told images done and images/s with each line.
    """

    def __init__(
        self, what: str, total: int, before: int, ledger: Any, publish: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self._what, self._total, self._before, self._ledger, self._publish = what, total, before, ledger, publish
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._moved = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def moved(self) -> None:
        """Something was done."""
        self._moved = time.monotonic()

    def quiet_seconds(self) -> float:
        """How long nothing has been done."""
        return time.monotonic() - self._moved

    def _watch(self) -> None:
        first: tuple[float, int] | None = None
        last = 0
        wait = FIRST_LINE_SECONDS
        while not self._stop.wait(wait):
            wait = LINE_SECONDS
            try:
                done = int(ray.get(self._ledger.total.remote(), timeout=LINE_SECONDS))
            except ray.exceptions.GetTimeoutError:
                continue
            now = time.monotonic()
            if done != last:
                last = done
                self.moved()
            if self.quiet_seconds() >= QUIET_SECONDS:
                log.info("%s: nothing done for %s", self._what, duration(self.quiet_seconds()))
                continue
            if done == 0:
                continue
            first = first or (now, done)
            recent, seconds = done - first[1], now - first[0]
            log.info(progress_line(self._what, self._before + done, self._total, recent, seconds))
            if self._publish is not None and seconds > 0:
                self._publish({"images_done": float(self._before + done), "images_per_second_so_far": recent / seconds})


def progress_line(what: str, done: int, total: int, recent: int, seconds: float) -> str:
    """`extract: 1,024/10,000 images, 310 images/s, 29 s left`; without a rate until one can be told."""
    line = f"{what}: {done:,}/{total:,} images"
    if seconds <= 0 or recent <= 0:
        return line
    rate = recent / seconds
    return f"{line}, {rate:,.1f} images/s, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """Seconds as `29 s`, `4 min 10 s` or `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
