"""MLflow runs: settings, metrics, result files, and the digests that tie one job to the next."""

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchsae_ray import storage
from patchsae_ray.errors import UserError, first_line

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

log = logging.getLogger(__name__)

EXPERIMENT = "patchsae_ray"
MLFLOW_BATCH = 1000
"""Metrics that a store takes at once."""
MAX_ARTIFACT_BYTES = 64 * 2**20
"""Larger result files stay where they are; the run gets their URI as a tag."""


class Tracker:
    """One MLflow run of one job.

    The store is $MLFLOW_TRACKING_URI, or a sqlite file in the root folder (in the working folder where the root is remote).

    Args:
        root_dir: `--root_dir`.
        job: train, extract, class_latents, steer.
        settings: the job's settings, logged as parameters.

    Raises: UserError where the store cannot be reached.
    """

    def __init__(self, root_dir: str, job: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri, artifacts = _store(root_dir)
        try:
            self._client: Any = MlflowClient(tracking_uri=uri)
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            number = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT, artifacts)
            run = self._client.create_run(number, run_name=job, tags={"job": job})
        except Exception as error:  # each store raises its own types; none of them is a fault of the images
            raise UserError(f"MLFLOW_TRACKING_URI {uri}: cannot start a run ({first_line(error)})") from error
        self.run_id = str(run.info.run_id)
        with self._carrying_on("settings"):
            for key, value in settings.items():
                self._client.log_param(self.run_id, key, str(value)[:6000])

    def tags(self, values: Mapping[str, Any]) -> None:
        """Digests and other facts, one tag each."""
        with self._carrying_on("tags"):
            for key, value in values.items():
                self._client.set_tag(self.run_id, key, str(value)[:5000])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers under stable names."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(key, float(value), now, step) for key, value in values.items()]
        with self._carrying_on("metrics"):
            for start in range(0, len(found), MLFLOW_BATCH):
                self._client.log_batch(self.run_id, metrics=found[start : start + MLFLOW_BATCH])

    def files(self, folder: str, names: Iterable[str]) -> None:
        """Result files of a folder: copied as artifacts, or named by a tag where they are large."""
        with self._carrying_on("files"), tempfile.TemporaryDirectory() as copies:
            for name in names:
                uri = storage.join(folder, name)
                self._client.set_tag(self.run_id, f"uri.{name}", uri)
                if storage.size(uri) <= MAX_ARTIFACT_BYTES:
                    copy = Path(copies) / name
                    copy.write_bytes(storage.read_bytes(uri))
                    self._client.log_artifact(self.run_id, str(copy))

    def finish(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        with self._carrying_on("the end"):
            self._client.set_terminated(self.run_id, status)

    @contextmanager
    def _carrying_on(self, what: str) -> Iterator[None]:
        """A tracking server that fails once the run is open costs a line in the log, not the work."""
        try:
            yield
        except Exception as error:
            log.warning("MLflow: %s of run %s not logged: %s", what, self.run_id, first_line(error))


@contextmanager
def tracked(root_dir: str, job: str, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """A run that is closed as FINISHED, FAILED or, after an interrupt, KILLED."""
    tracker = Tracker(root_dir, job, settings)
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish("FINISHED")


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
