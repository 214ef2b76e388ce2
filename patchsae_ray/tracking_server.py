"""The MLflow server, database or file that runs are logged to: whether its URI makes sense, and what is asked of it."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchsae_ray import storage
from patchsae_ray.errors import StoreError, UserError, first_line
from patchsae_ray.redaction import redacted, scrubbed, without_login
from patchsae_ray.tracking_spool import Entry

EXPERIMENT = "patchsae_ray"
MAX_ARTIFACT_BYTES = 64 * 2**20
"""Larger result files stay where they are; the run has their URI as a tag."""

_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Of MLflow's client, unless the user has set them: its own would try for minutes, and print the URI."""

_AWAY = {
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
    "CANCELLED", "ABORTED", "RESOURCE_CONFLICT", "INVALID_STATE",
}  # fmt: skip
"""MLflow's error codes for what may go well another time."""
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
"""And for entries that will never be taken."""


class ServerAway(Exception):
    """The server does not answer, or not now."""


class Refused(Exception):
    """The server takes none of it, now or later."""


class TrackingServer:
    """Where runs are logged to.

    Args:
        uri: the tracking URI.
        artifacts: where a new experiment keeps its artifacts; None for the server's own choice.
    """

    def __init__(self, uri: str, artifacts: str | None) -> None:
        self._uri, self._artifacts = uri, artifacts
        self._client: Any = None
        self._experiment = ""

    @property
    def name(self) -> str:
        """The URI without its secrets: a server's without user and query altogether, since a password may hold anything."""
        return redacted(self._uri if self.local else without_login(self._uri))

    @property
    def local(self) -> bool:
        """Whether it is a file of this machine, and no server that could be away."""
        return self._uri.startswith(("sqlite:", "file:")) or "://" not in self._uri

    @property
    def _database(self) -> bool:
        scheme, separator, _ = self._uri.partition("://")
        return bool(separator) and "sql" in scheme

    def check(self) -> None:
        """See that a database's URI makes sense, and that its driver is there; nothing is asked of it yet.

        Raises: UserError where it does not, or is not.
        """
        if self._database:
            self._engine().dispose()

    def connect(self) -> None:
        """Reach the server, and find or make the experiment.

        Raises: UserError where the URI is wrong or the server refuses this user, ServerAway where it does not answer.
        """
        for name, value in _CLIENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import InvalidUrlException, MlflowException
        from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        if self._database:
            self._check_database()
        try:
            client = MlflowClient(tracking_uri=self._uri)
            self._experiment = self._find_experiment(client)
        except (UnsupportedModelRegistryStoreURIException, InvalidUrlException) as error:
            raise UserError(
                f"MLFLOW_TRACKING_URI {self.name}: http(s)://host:port, sqlite:///file or another database's URI would be right"
            ) from error
        except MlflowException as error:
            if error.error_code in _AWAY:
                raise ServerAway(self._reason(_origin(error))) from error
            raise UserError(f"MLFLOW_TRACKING_URI {self.name}: cannot start a run ({self._reason(error)})") from error
        except Exception as error:  # each store raises its own types
            raise ServerAway(self._reason(_origin(error))) from error
        self._client = client

    def _find_experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return str(client.create_experiment(EXPERIMENT, self._artifacts))
            except Exception:
                found = client.get_experiment_by_name(EXPERIMENT)  # another job has just made it
                if found is None:
                    raise
        return str(found.experiment_id)

    def _check_database(self) -> None:
        """Connect once; MLflow itself would try for minutes.

        Raises: UserError where the URI is wrong, its driver is not installed, or the file is none; else ServerAway.
        """
        import sqlalchemy

        engine = self._engine()
        try:
            if self.local and engine.url.database:
                Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
            sqlalchemy.inspect(engine).get_table_names()
        except Exception as error:
            if self.local:
                reason = self._reason(_origin(error))
                raise UserError(f"MLFLOW_TRACKING_URI {self.name} cannot be opened: {reason}") from error
            raise ServerAway(self._reason(_origin(error))) from error
        finally:
            engine.dispose()

    def _engine(self) -> Any:
        import sqlalchemy

        try:
            return sqlalchemy.create_engine(self._uri)
        except ImportError as error:
            raise UserError(f"MLFLOW_TRACKING_URI {self.name} needs the Python package {error.name}") from error
        except Exception as error:  # the port is no number, say
            raise UserError(f"MLFLOW_TRACKING_URI {self.name} is no database URI: {self._reason(error)}") from error

    def find(self, run_id: str) -> frozenset[str] | None:
        """The names of a run's parameters; None where the server has no such run, or it was deleted."""
        from mlflow.exceptions import MlflowException

        with self._answering():
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
            return frozenset(run.data.params) if run.info.lifecycle_stage == "active" else None

    def create(self, job: str, time: int) -> str:
        """A new run, that began at `time` (milliseconds since 1970). Returns its id."""
        with self._answering():
            run = self._client.create_run(self._experiment, start_time=time, run_name=job, tags={"job": job})
        return str(run.info.run_id)

    def delete(self, run_id: str) -> None:
        with self._answering():
            self._client.delete_run(run_id)

    def log(self, run_id: str, entries: Sequence[Entry], kept: frozenset[str]) -> None:
        """Parameters, tags and metrics of entries, in one request where they fit into one.

        Logging the same again changes nothing.

        Args:
            run_id: the MLflow run.
            entries: neither files nor statuses.
            kept: parameters that the run keeps as they are.
        """
        from mlflow.entities import Metric, Param, RunTag

        params = {name: value for entry in entries for name, value in entry.params.items() if name not in kept}
        tags = {name: value for entry in entries for name, value in entry.tags.items()}
        metrics = [
            Metric(name, value, entry.time, entry.step) for entry in entries for name, value in entry.metrics.items()
        ]  # fmt: skip
        with self._answering():
            self._client.log_batch(
                run_id, metrics, [Param(*pair) for pair in params.items()], [RunTag(*pair) for pair in tags.items()]
            )

    def log_file(self, run_id: str, folder: str, name: str) -> None:
        """Copy a result file as an artifact, unless it is large.

        Raises: Refused where it is not there, ServerAway where either side does not answer.
        """
        uri = storage.join(folder, name)
        try:
            if storage.size(uri) > MAX_ARTIFACT_BYTES:
                return
            data = storage.read_bytes(uri)
        except StoreError as error:
            raise ServerAway(str(error)) from error
        except UserError as error:
            raise Refused(str(error)) from error
        with self._answering(), tempfile.TemporaryDirectory() as copies:
            copy = Path(copies) / name
            copy.write_bytes(data)
            self._client.log_artifact(run_id, str(copy))

    def reopen(self, run_id: str) -> None:
        """Set a run that had ended to RUNNING."""
        with self._answering():
            self._client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: str, time: int) -> None:
        """End a run as FINISHED, FAILED or KILLED at `time` (milliseconds since 1970)."""
        with self._answering():
            self._client.set_terminated(run_id, status, time)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Whatever a store raises → Refused for what it will never take, else ServerAway."""
        try:
            yield
        except Exception as error:
            kind = Refused if getattr(error, "error_code", "") in _REFUSED else ServerAway
            raise kind(self._reason(error if kind is Refused else _origin(error))) from error

    def _reason(self, error: BaseException) -> str:
        return first_line(Exception(scrubbed(str(error) or type(error).__name__, self._uri)))


def _origin(error: BaseException) -> BaseException:
    """What an exception comes from in the end: `Connection refused`, say, which the clients wrap several times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error
