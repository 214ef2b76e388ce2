"""Units through Ray, a wave at a time: partials are grouped as they come, and each group is combined and committed."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray

from patchsae_ray.data.manifest import Manifest
from patchsae_ray.pipelines.arrivals import Arrivals
from patchsae_ray.pipelines.bundles import MAX_UNITS, BundleFolder
from patchsae_ray.pipelines.claims import Desk
from patchsae_ray.pipelines.merging import Helpers, Receipt, combine
from patchsae_ray.pipelines.planning import Plan
from patchsae_ray.pipelines.progress import ProgressLines, refuse_quiet, start_ledger
from patchsae_ray.pipelines.ray_faults import lost, out_of_memory
from patchsae_ray.pipelines.units import Totals, UnitTask, partials

log = logging.getLogger(__name__)

COMBINES_AT_ONCE = 4
WAITING_PARTIALS = 2 * MAX_UNITS
"""Partials that may wait to be combined; more hold the actors back."""


@dataclass
class Waves:
    """Runs units, and says what came of them; its ledger and progress lines live while the `with` block runs.

    Args:
        what: the job's name in its lines.
        manifest: the images.
        image_size: side of the decoded pixels.
        task: what the actors run.
        totals: what their results are merged in.
        plan: who gets what.
        folder: where bundles are committed.
        where: combining tasks run.
        no_progress_minutes: after which it is given up.
        commit_seconds: how long partials wait, at most, for others to be committed with.
        publish: is told images done and images/s with each line of progress.
    """

    what: str
    manifest: Manifest
    image_size: int
    task: UnitTask
    totals: type[Totals]
    plan: Plan
    folder: BundleFolder
    where: Helpers
    no_progress_minutes: float
    commit_seconds: float
    publish: Any
    _running: dict[Any, int] = field(default_factory=dict)
    """Combining tasks, and the number of partials that each was given."""

    def __enter__(self) -> "Waves":
        self._sent = ray.put(self.task)
        self._ledger = start_ledger(len(self.manifest.units))
        self.progress = ProgressLines(self.what, self.manifest.num_images, 0, self._ledger, self.publish)
        self.progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.__exit__(kind, error, trace)
        ray.kill(self._ledger)

    def run(self, units: Sequence[int], desk: Desk) -> Iterator[Receipt]:
        """Run units, as far as the desk lets this driver have them. Gives receipts as bundles are committed.

        What is lost with a machine is left out, with a line in the log, and its units can be run again.

        Raises: UserError where nothing has been done for too long, a machine's memory is full, or the store stays away.
        """
        self._open_desk(desk)
        self._running.clear()
        data = partials(self.manifest, units, self.image_size, self._sent, self.plan, self._ledger)
        with Arrivals(data, WAITING_PARTIALS) as arrivals:
            yield from self._receipts(arrivals)

    def _open_desk(self, desk: Desk) -> None:
        """Have units claimed at a desk, by a new ledger where the old one's process has ended."""
        try:
            ray.get(self._ledger.open_desk.remote(desk))
        except ray.exceptions.RayError as error:
            self._survive(error, "the ledger of what is done")
            self._ledger = start_ledger(len(self.manifest.units))
            self.progress.follow(self._ledger)
            ray.get(self._ledger.open_desk.remote(desk))

    def _receipts(self, arrivals: Arrivals) -> Iterator[Receipt]:
        waiting: list[Any] = []
        oldest = time.monotonic()
        for reference in self._ticking(arrivals):
            if reference is not None:
                oldest = oldest if waiting else time.monotonic()
                waiting.append(reference)
            if waiting and (len(waiting) >= MAX_UNITS or time.monotonic() - oldest >= self.commit_seconds):
                self._combine(waiting)
                waiting = []
            yield from self._finished(COMBINES_AT_ONCE)
        if waiting:
            self._combine(waiting)
        yield from self._finished(0)

    def _combine(self, blocks: list[Any]) -> None:
        options = {"num_cpus": self.where.combine_cpus, "scheduling_strategy": self.where.scheduling, "max_retries": 5}
        remote = ray.remote(**options)(combine)
        self._running[remote.remote(self.folder, self.totals, *blocks)] = len(blocks)

    def _finished(self, most: int) -> Iterator[Receipt]:
        """Receipts of the combining tasks that are done, after waiting until no more than `most` are at work.

        Raises: UserError where nothing has been done for too long.
        """
        while self._running:
            full = len(self._running) > most
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0 if full else 0, fetch_local=False)
            if not done and full:
                self.see_progress()
                continue
            if not done:
                return
            size = self._running.pop(done[0])
            try:
                receipt: Receipt = ray.get(done[0])
            except Exception as error:
                self._survive(error, f"the results of {size} units")
                continue
            yield receipt
            self.progress.moved()

    def _ticking(self, arrivals: Arrivals) -> Iterator[Any]:
        """References to partials as they come, and None each second without one.

        Raises: UserError where nothing has been done for too long.
        """
        while True:
            try:
                reference = arrivals.next(timeout=1.0)
            except StopIteration:
                return
            except Exception as error:
                self._survive(error, "what was under way")
                return
            if reference is not None:
                self.progress.moved()
            else:
                self.see_progress()
            yield reference

    def see_progress(self) -> None:
        """Raises: UserError where nothing has been done for too long."""
        refuse_quiet(self.what, self.progress.quiet_seconds(), self.no_progress_minutes)

    def _survive(self, error: Exception, work: str) -> None:
        """Go on where work was lost with a machine.

        Raises: the error, or what it means to the user, where it is something else.
        """
        full = out_of_memory(error)
        if full is not None:
            raise full from error
        reason = lost(error)
        if not reason:
            raise error
        log.warning("%s: %s went with a machine or process (%s); it is run again", self.what, work, reason)
