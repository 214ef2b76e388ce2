"""One line at a time: images done, images/s, time left. Reads well in a terminal and in `ray job logs`."""

import logging
import threading
import time
from types import TracebackType
from typing import Any

import ray

log = logging.getLogger(__name__)

FIRST_LINE_SECONDS = 3.0
LINE_SECONDS = 10.0
REPORT_SECONDS = 1.0


class Meter:
    """Images done in each unit, reported from inside the units, so that slow units show progress too."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def report(self, unit: int, images: int) -> None:
        """`images` of a unit are done; a unit that is tried again counts once."""
        self._done[unit] = max(images, self._done.get(unit, 0))

    def total(self) -> int:
        return sum(self._done.values())


class Reporter:
    """An actor's side of the meter: at most one report a second, and one at the end of each unit."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter
        self._last = 0.0

    def report(self, unit: int, images: int, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._last >= REPORT_SECONDS:
            self._meter.report.remote(unit, images)
            self._last = now


class ProgressLines:
    """Logs a line every ten seconds while the `with` block runs.

    Args:
        what: the job's name in the line.
        total: images to do.
    """

    def __init__(self, what: str, total: int) -> None:
        self.meter: Any = ray.remote(num_cpus=0)(Meter).remote()
        self._what, self._total = what, total
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "ProgressLines":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        ray.kill(self.meter)

    def _watch(self) -> None:
        first: tuple[float, int] | None = None
        wait = FIRST_LINE_SECONDS
        while not self._stop.wait(wait):
            wait = LINE_SECONDS
            done = ray.get(self.meter.total.remote())
            now = time.monotonic()
            if done == 0:
                continue
            first = first or (now, done)
            log.info(progress_line(self._what, done, self._total, done - first[1], now - first[0]))


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
