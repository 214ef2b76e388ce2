"""MLflow runs: settings, metrics, result files, and the digests that tie one job to the next.

Nothing here keeps the work waiting for longer than seconds: entries are queued and logged by an `Uploader`, and kept in the
results folder while the server is away.
"""

import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchsae_ray import storage
from patchsae_ray.errors import UserError, first_line
from patchsae_ray.redaction import redacted, without_secrets
from patchsae_ray.signals import on_sigterm, terminated
from patchsae_ray.tracking_server import TrackingServer
from patchsae_ray.tracking_spool import Entry, Place, now
from patchsae_ray.tracking_uploader import Uploader

log = logging.getLogger(__name__)

OPEN_SECONDS = 8.0
"""How long a job waits at its start for a server."""
OPEN_LOCAL_SECONDS = 300.0
"""And for a file of this machine, in which a first run makes MLflow's tables."""
PATIENCE_SECONDS = 30.0
"""How long a job waits at its end while nothing is logged: of the result files, one at a time is copied."""
AWAY_SECONDS = 3.0
"""The same for a server that did not answer before."""
KILLED_SECONDS = 1.5
"""How long after a signal, whatever is logged: `ray job stop` leaves 3 s for everything."""


class Tracker:
    """One MLflow run of one job; the run of an earlier start of the same work, where that did not finish it.

    The store is $MLFLOW_TRACKING_URI, or a sqlite file in the root folder (in the working folder where the root is remote).
    No method waits for it; where it does not answer, what was to be logged is kept beside the results and logged later.

    Args:
        root_dir: `--root_dir`.
        job: train, extract, class_latents, steer.
        settings: the job's settings, logged as parameters.
        folder: the results folder.
        key: the run key.

    Raises: UserError where the store's URI is wrong, or it refuses.
    """

    def __init__(self, root_dir: str, job: str, settings: Mapping[str, Any], folder: str, key: str) -> None:
        server = TrackingServer(*_store(root_dir))
        self._folder = folder
        self._uploader = Uploader(server, job, Place(folder, key))
        self._closing = threading.Lock()
        self._closed = False
        self._put(params=_texts(settings, 6000))
        try:
            _wait_for(self._uploader, server)
        except KeyboardInterrupt:
            self.finish("KILLED")
            raise

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server is away and no earlier start has opened the run."""
        return self._uploader.run_id

    def tags(self, values: Mapping[str, Any]) -> None:
        """Digests and other facts, one tag each."""
        self._put(tags=_texts(values, 5000))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers under stable names."""
        self._put(metrics={name: float(value) for name, value in values.items()}, step=step)

    def files(self, names: Iterable[str]) -> None:
        """Files of the results folder: named by a tag each, and copied as artifacts where they are not large."""
        names = list(names)
        self.tags({f"uri.{name}": storage.join(self._folder, name) for name in names})
        for name in names:
            self._put(file=name)

    def _put(self, **values: Any) -> None:
        self._uploader.put(Entry(now(), **values))

    def finish(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED; once it is closed, do nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            most = KILLED_SECONDS if status == "KILLED" else math.inf
            self._uploader.close(Entry(now(), status=status), _patience(self._uploader), most)


@contextmanager
def tracked(root_dir: str, job: str, settings: Mapping[str, Any], folder: str, key: str) -> Iterator[Tracker]:
    """A run that is closed as FINISHED, FAILED or, after an interrupt or SIGTERM, KILLED.

    Raises: UserError as `Tracker`.
    """
    tracker = Tracker(root_dir, job, settings, folder, key)
    with on_sigterm(lambda: tracker.finish("KILLED")):
        try:
            yield tracker
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) or terminated() else "FAILED")
            raise
    tracker.finish("FINISHED")


def check_store() -> None:
    """Before anything else is begun: see that $MLFLOW_TRACKING_URI, where it is a database's, can be one.

    Raises: UserError that says what is wrong with it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        TrackingServer(given, None).check()


def upload_left(root_dir: str, job: str, folder: str, key: str) -> None:
    """Log what earlier starts of a run that is done have left in its spool; where that fails, a line in the log."""
    try:
        pieces = Place(folder, key).pieces()
        if not pieces:
            return
        server = TrackingServer(*_store(root_dir))
        uploader = Uploader(server, job, Place(folder, key), resume=False)
        _wait_for(uploader, server)
        uploader.close(None, _patience(uploader))
        if not uploader.away:
            log.info("MLflow: what %s kept of the run is logged", storage.join(folder, "mlflow"))
    except UserError as error:
        log.warning("%s", error)


def _wait_for(uploader: Uploader, server: TrackingServer) -> None:
    """Wait a while for the run to be open.

    Raises: UserError where the server's URI is wrong.
    """
    try:
        uploader.opened.result(OPEN_LOCAL_SECONDS if server.local else OPEN_SECONDS)
    except FutureTimeoutError:
        uploader.say_away(f"for {OPEN_SECONDS:.0f} s")


def _patience(uploader: Uploader) -> float:
    return AWAY_SECONDS if uploader.away or not uploader.opened.done() else PATIENCE_SECONDS


def _texts(values: Mapping[str, Any], longest: int) -> dict[str, str]:
    """As MLflow takes them: texts of limited length, without secrets."""
    return {name: redacted(str(without_secrets(value)))[:longest] for name, value in values.items()}


def _store(root_dir: str) -> tuple[str, str | None]:
    """(tracking URI, artifact location or None for the store's own)."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given, None
    folder = Path(root_dir.removeprefix("file://") if storage.is_local(root_dir) else ".").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--root_dir {root_dir}: cannot make that folder ({first_line(error)})") from error
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlruns").as_uri()
