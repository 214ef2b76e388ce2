"""What is done and being tried, and one line at a time about it: images done, images/s, time left."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.claims import Desk
from patchsae_ray.pipelines.ray_faults import ended_for_memory, nodes_alive

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
        self._open: dict[tuple[str, Hashable], list[tuple[str, str]]] = {}

    def begin(self, stage: str, key: Hashable, node: str, worker: str = "") -> int:
        """Note an attempt. Returns the deaths: earlier attempts that never ended, on nodes that are still alive.

        Args:
            stage: decode or model.
            key: of the piece; nothing else may be tried under it at the same time.
            node: id of the node of the attempt.
            worker: id of its process.
        """
        earlier = self._open.setdefault((stage, key), [])
        if earlier:
            alive = self._alive()
            earlier[:] = [one for one in earlier if one[0] in alive]
        deaths = len(earlier)
        earlier.append((node, worker))
        return deaths

    def died(self, stage: str, keys: Sequence[Hashable]) -> int:
        """Attempts at some pieces that have begun and not ended."""
        return sum(len(self._open.get((stage, key), [])) for key in keys)

    def end(self, stage: str, key: Hashable, node: str, worker: str = "") -> None:
        """One attempt there ended, well or with an error; the deaths of others stay on record."""
        attempts = self._open.get((stage, key), [])
        if (node, worker) in attempts:
            attempts.remove((node, worker))
        if not attempts:
            self._open.pop((stage, key), None)

    def ended_for_memory(self, stage: str, key: Hashable) -> int:
        """How many of the attempts that never ended Ray ended itself, for the memory of their machine."""
        return ended_for_memory(worker for _, worker in self._open.get((stage, key), []) if worker)


class Ledger(Attempts):
    """Images done in each unit, reported from inside the units, and which units may be begun.

    Args:
        num_units: of the data set.
    """

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self._desk: Desk | None = None
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

    @ray.method(concurrency_group="claims")  # so that reports do not wait for the store
    def open_desk(self, desk: Desk) -> None:
        """From now on units are claimed here; until then any may be begun."""
        self._desk = desk

    @ray.method(concurrency_group="claims")
    def claim(self, unit: int) -> bool:
        """Whether this driver may run a unit, as `Desk.claim`."""
        return self._desk is None or self._desk.claim(unit)


def start_ledger(num_units: int) -> Any:
    """A ledger as an actor on the driver's own machine, so that it lives as long as the driver."""
    remote = ray.remote(num_cpus=0, concurrency_groups={"claims": 1})(Ledger)
    return remote.options(scheduling_strategy=on_this_machine()).remote(num_units)


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
        ledger: the actor that knows of this run's.
        publish: is told images done and images/s with each line.
    """

    def __init__(
        self, what: str, total: int, before: int, ledger: Any, publish: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self._what, self._total, self._ledger, self._publish = what, total, ledger, publish
        self._elsewhere, self._note = before, ""
        self._seen, self._earlier = 0, 0
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

    def elsewhere(self, images: int) -> None:
        """So many images were done by earlier runs and other drivers."""
        if images > self._elsewhere:
            self.moved()
        self._elsewhere = images

    def follow(self, ledger: Any) -> None:
        """Ask a new ledger from now on; what the old one knew of stays counted."""
        self._earlier, self._seen, self._ledger = self._earlier + self._seen, 0, ledger

    def note(self, said: str) -> None:
        """What the line ends with from now on, in place of a rate; empty for the rate."""
        self._note = said

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
                self._seen = int(ray.get(self._ledger.total.remote(), timeout=LINE_SECONDS))
            except ray.exceptions.RayError:  # it is late, or its process has ended: the next wave begins with a new one
                continue
            now, done = time.monotonic(), self._earlier + self._seen
            so_far = min(self._elsewhere + done, self._total)
            if done != last:
                last = done
                self.moved()
            if self._note:
                log.info(f"{progress_line(self._what, so_far, self._total, 0, 0.0)}, {self._note}")
                first = None
                continue
            if self.quiet_seconds() >= QUIET_SECONDS:
                log.info("%s: nothing done for %s", self._what, duration(self.quiet_seconds()))
                continue
            if done == 0:
                continue
            first = first or (now, done)
            recent, seconds = done - first[1], now - first[0]
            log.info(progress_line(self._what, so_far, self._total, recent, seconds))
            if self._publish is not None and seconds > 0:
                self._publish({"images_done": float(so_far), "images_per_second_so_far": recent / seconds})


class Patience:
    """For waits without lines of progress: says each minute what is waited for, and gives up after a while.

    Args:
        what: the job's name in the line.
        minutes: after which it is given up; infinite for never.
    """

    def __init__(self, what: str, minutes: float) -> None:
        self._what, self._minutes = what, minutes
        self.moved()

    def moved(self) -> None:
        """Something was done."""
        self._moved, self._lines = time.monotonic(), 0

    def see(self, waits_for: Callable[[], str]) -> None:
        """To be called again and again while nothing is done.

        Args:
            waits_for: what the line says of it.

        Raises: UserError as `refuse_quiet`.
        """
        quiet = time.monotonic() - self._moved
        refuse_quiet(self._what, quiet, self._minutes)
        if quiet >= QUIET_SECONDS * (self._lines + 1):
            self._lines += 1
            log.info("%s: nothing done for %s, waiting for %s", self._what, duration(quiet), waits_for())


def refuse_quiet(what: str, quiet: float, minutes: float) -> None:
    """Give up where nothing was done for more than so many minutes.

    Raises: UserError.
    """
    if quiet > 60 * minutes:
        raise UserError(
            f"{what}: nothing was done for {duration(quiet)} "
            "(--no_progress_minutes); what was committed stays, and the same command goes on from there"
        )


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
