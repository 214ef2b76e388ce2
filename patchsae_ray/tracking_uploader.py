"""Logging to MLflow on a thread of its own: a server that is slow or away costs the work nothing, and what waits is kept."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from patchsae_ray.errors import StoreError, UserError, first_line
from patchsae_ray.tracking_server import Refused, ServerAway, TrackingServer
from patchsae_ray.tracking_spool import FLUSH_SECONDS, Entry, Place, Spool, now

log = logging.getLogger(__name__)

MOST_WAITING = 20_000
"""Entries in the queue; where they are more, the server hangs, and they are put into the spool."""
MOST_AT_ONCE = 500
RETRY_SECONDS = 30.0
MOST_RETRY_SECONDS = 300.0


class Uploader:
    """Logs the entries of one run in their order, or keeps them in its spool while the server is away.

    Args:
        server: to log to.
        job: the name of a new MLflow run.
        place: what the results folder keeps of the run.
        resume: whether a run that an earlier start has opened goes on; else it gets what waits in its spool, and no more.
    """

    def __init__(self, server: TrackingServer, job: str, place: Place, resume: bool = True) -> None:
        self._server, self._job, self._place, self._resume = server, job, place, resume
        self.run_id: str | None = None
        """The MLflow run; None until one is open, or known from an earlier start."""
        self.opened: Future[None] = Future()
        """Done once the server has answered or is known to be away; holds the UserError where its URI is wrong."""
        self.away = False
        """Whether the server did not answer the last time."""
        self._said_away = False
        self._waiting: SimpleQueue[Entry | None] = SimpleQueue()  # its put may be interrupted by a signal's
        self._in_flight: list[Entry] = []
        self._spool = Spool(place)
        self._connected = self._open = self._set_aside = self._closing = self._finished = self._refused = False
        self._params: frozenset[str] = frozenset()
        """Names of the parameters that the run has already; they cannot change."""
        self._logged = 0
        self._started, self._retry, self._pause = now(), 0.0, RETRY_SECONDS
        self._ended, self._abandoned = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="mlflow", daemon=True).start()

    def put(self, entry: Entry) -> None:
        """Have an entry logged. Returns at once."""
        if self._waiting.qsize() >= MOST_WAITING:
            threading.Thread(target=self._put_aside, args=(self._drained(),), name="mlflow-spool", daemon=True).start()
        self._waiting.put(entry)

    def _put_aside(self, entries: list[Entry]) -> None:
        try:
            self._spool.write(entries)
        except UserError as error:
            log.warning("MLflow: %s", error)
            self._spool.held += entries
        self._set_aside = True

    def close(self, last: Entry | None, patience: float, most: float = math.inf) -> None:
        """Wait until all is logged or in the spool.

        Args:
            last: the last entry.
            patience: seconds without anything logged after which the rest is put into the spool, whatever the server does.
            most: seconds after which it is in any case.
        """
        self._closing = True
        if last is not None:
            self._waiting.put(last)
        self._waiting.put(None)
        logged, deadline = -1, time.monotonic() + most
        try:
            while logged != self._logged and time.monotonic() < deadline:
                logged = self._logged
                if self._ended.wait(min(patience, most)):
                    break
        finally:  # an interrupt too
            self._abandon()

    def _abandon(self) -> None:
        """Log nothing more, and put what is left into the spool."""
        self._abandoned.set()
        left = [*self._spool.held, *self._in_flight, *self._drained()]
        try:
            self._spool.write(left)
        except UserError as error:
            log.warning("MLflow: %d entries are lost: %s", len(left), error)

    def _drained(self) -> list[Entry]:
        """All that waits in the queue."""
        found = []
        try:
            while True:
                entry = self._waiting.get_nowait()
                if entry is not None:
                    found.append(entry)
        except Empty:
            return found

    def _run(self) -> None:
        try:
            self._attempt()
            self.opened.set_result(None)
            self._go_on()
        except Exception as error:
            if not self.opened.done():
                self.opened.set_exception(error)
            else:  # a fault of ours, which must not end the work
                log.warning("MLflow: %s: what is to be logged is kept in %s", first_line(error), self._place.uri)
        finally:
            self._ended.set()

    def _go_on(self) -> None:
        """Log what comes until `close`."""
        last = False
        while not last and not self._abandoned.is_set():
            last = self._take()
            if last or not self.away or time.monotonic() >= self._retry:
                try:
                    self._attempt()
                except UserError as error:
                    self._now_away(str(error))
            if self.away:
                self._spool.held += self._in_flight
                self._in_flight = []
            if not self._abandoned.is_set():
                self._spool.flush(0.0 if last else FLUSH_SECONDS)
        if self._finished and not self._abandoned.is_set():
            self._forget()

    def _take(self) -> bool:
        """Wait for entries, and take many at once. Returns whether there will be no more."""
        try:
            entry = self._waiting.get(timeout=1.0)
            while entry is not None:
                self._in_flight.append(entry)
                if len(self._in_flight) >= MOST_AT_ONCE:
                    return False
                entry = self._waiting.get_nowait()
            return True
        except Empty:
            return False

    def _attempt(self) -> None:
        """Log what waits: what is spooled, if the server was away or this is the start, then what was taken.

        Raises: UserError where the server's URI is wrong.
        """
        try:
            if not self._connected:
                self.run_id = self._place.run_id()
                self._server.connect()
                self._connected = True
            if not self._open or self._set_aside or self._spool.held or self.away:
                self._catch_up()
            self._send(self._in_flight)
            if self._said_away:
                log.info("MLflow: %s answers again", self._server.name)
            self.away, self._said_away, self._pause = False, False, RETRY_SECONDS
        except (ServerAway, StoreError) as error:
            self._now_away(str(error))
        except Refused as error:
            raise UserError(f"MLFLOW_TRACKING_URI {self._server.name}: cannot start a run ({error})") from error

    def _catch_up(self) -> None:
        """Find or open the run, and log what its spool holds."""
        self._set_aside = False
        pieces = self._place.pieces()
        entries = self._spool.read(pieces[0]) if pieces else []
        known = self._server.find(self.run_id) if self.run_id else None
        if known is None:
            self._new_run(entries[0].time if entries else self._started)
        else:
            self._params = known
        for index, piece in enumerate(pieces):
            self._send(self._spool.read(piece) if index else entries)
            if self._abandoned.is_set():
                return
            self._place.remove(piece)
        if not self._open and self._resume and not self._closing:
            self._begin_again(known is not None)
        self._open = True
        self._send(self._spool.held)

    def _begin_again(self, opened_before: bool) -> None:
        """The run of an earlier start is RUNNING once more; where the spool said that it had finished, this is another."""
        if self._finished:
            self._finished, self._params, self.run_id = False, frozenset(), None
            self._place.forget()
            self._new_run(self._started)
        elif opened_before:
            self._server.reopen(str(self.run_id))

    def _new_run(self, began: int) -> None:
        made = self._server.create(self._job, began)
        self.run_id = self._place.keep_run_id(made, instead_of=self.run_id)
        if self.run_id != made:
            self._server.delete(made)

    def _send(self, entries: list[Entry]) -> None:
        """Log entries, taking each off the list once it is logged."""
        for group in _groups(list(entries)):
            if self._abandoned.is_set():
                return
            try:
                self._log(group)
            except Refused as error:
                self._log_singly(group, error)
            del entries[: len(group)]
            self._logged += 1

    def _log(self, group: list[Entry]) -> None:
        assert self.run_id is not None
        first = group[0]
        if first.file:
            self._log_file(first)
        elif first.status:
            self._server.close(self.run_id, first.status, first.time)
            self._finished = first.status == "FINISHED"
        else:
            self._server.log(self.run_id, group, self._params)

    def _log_singly(self, group: list[Entry], refused: Refused) -> None:
        """So that one entry which the server never takes costs no other."""
        if len(group) == 1:
            if not self._refused:
                log.warning("MLflow: not logged: %s", refused)
            self._refused = True
            return
        for entry in group:
            try:
                self._log([entry])
            except Refused as error:
                self._log_singly([entry], error)

    def _log_file(self, entry: Entry) -> None:
        """A file that cannot be copied waits for the next start, and nothing waits for it."""
        assert self.run_id is not None
        try:
            self._server.log_file(self.run_id, self._place.folder, entry.file)
        except ServerAway as error:
            log.warning("MLflow: %s is not copied, the next start of this run tries it again: %s", entry.file, error)
            self._spool.write([entry])

    def _now_away(self, reason: str) -> None:
        self.say_away(reason)
        self.away = True
        self._retry = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, MOST_RETRY_SECONDS)

    def say_away(self, reason: str) -> None:
        """One line, until the server answers again."""
        if not self._said_away:
            log.warning(
                "MLflow: %s does not answer (%s); the work goes on, and what is to be logged is kept in %s until it answers, "
                "or the same command is started again",
                self._server.name, reason, self._place.uri,
            )  # fmt: skip
        self._said_away = True

    def _forget(self) -> None:
        try:
            if not self._place.pieces():
                self._place.forget()
        except UserError as error:
            log.warning("MLflow: %s", error)


def _groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Neighbours that one request logs; a file and a status each by itself."""
    group: list[Entry] = []
    for entry in entries:
        alone = bool(entry.file or entry.status)
        if group and (alone or len(group) >= MOST_AT_ONCE):
            yield group
            group = []
        if alone:
            yield [entry]
        else:
            group.append(entry)
    if group:
        yield group
