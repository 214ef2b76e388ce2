"""MLflow that is away, slow or dying costs the work nothing, and nothing is lost."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from patchsae_ray import storage, tracking
from patchsae_ray.cli import run_job
from patchsae_ray.errors import UserError
from patchsae_ray.settings import TrainSettings
from patchsae_ray.tracking import Tracker, check_store, tracked, upload_left
from patchsae_ray.tracking_spool import Entry, Place, Spool
from tests.conftest import GOLDEN, free_ports
from tests.pipelines.commands import wait_for
from tests.pipelines.test_training import MODEL, SHORT

KEY = "0123456789abcdef" * 2
Start = Callable[..., Tracker]


@pytest.fixture
def store(ready_mlflow: Path, tmp_path: Path) -> str:
    """The tracking URI of a sqlite store."""
    shutil.copy(ready_mlflow, tmp_path / "store.db")
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def hanging() -> Iterator[str]:
    """The tracking URI of a server that takes connections and never answers."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        opened.listen(1000)
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the run on a tracking URI, as often as wanted, with little patience."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("OPEN_SECONDS", "AWAY_SECONDS"):
        monkeypatch.setattr(tracking, name, 0.3)

    def start(uri: str, **settings: Any) -> Tracker:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return Tracker(str(tmp_path), "train", settings, str(tmp_path / "results"), KEY)

    return start


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def all_runs(uri: str) -> list[Any]:
    client = client_of(uri)
    number = client.get_experiment_by_name("patchsae_ray").experiment_id
    return list(client.search_runs([number], filter_string="tags.job = 'train'"))


def only_run(uri: str) -> Any:
    (run,) = all_runs(uri)
    return run


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((found.step, found.value) for found in client_of(uri).get_metric_history(run_id, name))


def kept(tmp_path: Path) -> list[Entry]:
    """What waits in the run's folder."""
    place = Place(str(tmp_path / "results"), KEY)
    return [entry for piece in place.pieces() for entry in Spool(place).read(piece)]


def left_files(tmp_path: Path) -> list[str]:
    return [entry.path for entry in storage.entries(str(tmp_path / "results" / "mlflow"))]


def test_a_run_is_logged_whole(store: str, begin: Start, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.txt").write_text("result")
    run = begin(store, lr=0.1, sae_path="https://u:SECRET@host/x?sig=SECRET", **{f"setting_{i}": i for i in range(150)})
    run.tags({"digest": "d", "source": "s3://key:SECRET@bucket"})
    for step in range(1200):
        run.metrics({"loss": step / 2}, step)
    run.files(["a.txt", "none.txt"])
    run.finish("FINISHED")
    found = only_run(store)
    assert found.info.run_id == run.run_id
    assert found.info.status == "FINISHED"
    assert len(found.data.params) == 152
    assert "SECRET" not in str(found.data)
    assert found.data.tags["uri.a.txt"] == str(tmp_path / "results" / "a.txt")
    assert history(store, found.info.run_id, "loss") == [(step, step / 2) for step in range(1200)]
    assert [file.path for file in client_of(store).list_artifacts(found.info.run_id)] == ["a.txt"]
    assert not left_files(tmp_path)


def test_a_server_that_hangs_keeps_no_step_waiting_and_the_next_start_uploads(
    store: str, hanging: str, begin: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(hanging, lr=0.1)
    for step in range(3000):
        run.metrics({"loss": 1.0}, step)  # the server has not answered one request
    run.finish("KILLED")
    assert run.run_id is None
    assert len([record for record in caplog.records if record.name.startswith("patchsae_ray")]) == 1
    assert f"{hanging} does not answer" in caplog.text
    entries = kept(tmp_path)
    assert len([entry for entry in entries if entry.metrics]) == 3000
    assert [entry.status for entry in entries if entry.status] == ["KILLED"]

    again = begin(store, lr=0.1)
    again.metrics({"loss": 1.0}, 3000)
    again.finish("FINISHED")
    found = only_run(store)
    assert history(store, found.info.run_id, "loss") == [(step, 1.0) for step in range(3001)]
    assert found.data.params == {"lr": "0.1"}
    assert found.info.status == "FINISHED"
    assert not left_files(tmp_path)


def test_a_full_queue_is_spooled_while_the_server_hangs(
    hanging: str, begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchsae_ray.tracking_uploader.MOST_WAITING", 100)
    run = begin(hanging)
    for step in range(250):
        run.metrics({"loss": 1.0}, step)
    wait_for(lambda: len([entry for entry in kept(tmp_path) if entry.metrics]) >= 150)
    run.finish("KILLED")
    assert sorted(entry.step for entry in kept(tmp_path) if entry.metrics) == list(range(250))


def test_the_run_that_was_ended_goes_on_and_keeps_its_parameters(store: str, begin: Start, tmp_path: Path) -> None:
    first = begin(store, workers=1)
    first.metrics({"loss": 1.0}, 1)
    first.finish("KILLED")
    assert only_run(store).info.status == "KILLED"

    second = begin(store, workers=2, more=3)
    assert second.run_id == first.run_id
    wait_for(lambda: only_run(store).info.status == "RUNNING")
    second.finish("FAILED")
    assert only_run(store).data.params == {"workers": "1", "more": "3"}

    client_of(store).delete_run(first.run_id)
    third = begin(store)
    assert third.run_id not in (None, first.run_id)
    third.finish("FINISHED")
    assert not left_files(tmp_path)
    assert begin(store).run_id != third.run_id, "a finished run does not go on"


def test_of_two_drivers_the_second_joins_the_run_of_the_first(store: str, begin: Start) -> None:
    first = begin(store)
    second = begin(store)
    assert second.run_id == first.run_id
    first.finish("FINISHED")
    second.finish("FINISHED")
    assert only_run(store).info.status == "FINISHED"


def test_a_store_that_fails_at_once_is_one_line_and_loses_nothing(
    store: str, begin: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(store)

    def fail(*given: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr("mlflow.MlflowClient.log_batch", fail)
        for step in range(10):
            run.metrics({"loss": 1.0}, step)
            wait_for(lambda: "the disk is full" in caplog.text)
        run.finish("KILLED")
    assert caplog.text.count("the disk is full") == 1
    begin(store).finish("KILLED")
    assert len(history(store, str(run.run_id), "loss")) == 10


def test_what_the_store_never_takes_costs_no_other_entry(store: str, begin: Start, caplog: pytest.LogCaptureFixture) -> None:
    run = begin(store)
    for step in range(10):
        run.metrics({"no*name": 1.0}, step)
        run.metrics({"loss": 1.0}, step)
    run.finish("FINISHED")
    assert len(history(store, str(run.run_id), "loss")) == 10
    assert caplog.text.count("not logged") == 1


def test_a_file_that_cannot_be_copied_waits_alone(
    store: str, begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.txt").write_text("result")

    def fail(*given: object) -> None:
        raise OSError("no such bucket")

    run = begin(store)
    with monkeypatch.context() as broken:
        broken.setattr("mlflow.MlflowClient.log_artifact", fail)
        run.files(["a.txt"])
        run.metrics({"loss": 1.0}, 1)
        run.finish("FINISHED")
    assert only_run(store).info.status == "FINISHED"
    assert [entry.file for entry in kept(tmp_path)] == ["a.txt"]

    upload_left(str(tmp_path), "train", str(tmp_path / "results"), KEY)
    found = only_run(store)
    assert [file.path for file in client_of(store).list_artifacts(found.info.run_id)] == ["a.txt"]
    assert found.info.status == "FINISHED"


def test_a_run_that_is_done_is_uploaded_by_its_next_start(
    store: str, begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports(1)[0]
    run = begin(f"http://127.0.0.1:{port}", lr=0.1)
    run.metrics({"loss": 1.0}, 1)
    run.finish("FINISHED")
    upload_left(str(tmp_path), "train", str(tmp_path / "results"), KEY)
    assert len(kept(tmp_path)) == 3

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    upload_left(str(tmp_path), "train", str(tmp_path / "results"), KEY)
    found = only_run(store)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.1"}
    assert not left_files(tmp_path)


def test_a_finished_run_that_is_done_anew_is_another_run(store: str, begin: Start, tmp_path: Path) -> None:
    first = begin(f"http://127.0.0.1:{free_ports(1)[0]}", lr=0.1)
    first.finish("FINISHED")
    second = begin(store, lr=0.2)
    second.finish("KILLED")
    params = {run.info.status: run.data.params for run in all_runs(store)}
    assert params == {"FINISHED": {"lr": "0.1"}, "KILLED": {"lr": "0.2"}}
    third = begin(store, lr=0.3)
    assert third.run_id == second.run_id
    third.finish("FINISHED")
    assert not left_files(tmp_path)


def test_an_experiment_that_was_deleted_is_the_users_to_restore(store: str, begin: Start) -> None:
    begin(store).finish("FINISHED")
    client = client_of(store)
    client.delete_experiment(client.get_experiment_by_name("patchsae_ray").experiment_id)
    with pytest.raises(UserError, match=r"cannot start a run .*must be in the 'active' state"):
        begin(store)


def test_a_fault_of_ours_ends_nothing_and_loses_nothing(
    store: str, begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(store)

    def fail(*given: object) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as broken:
        broken.setattr("patchsae_ray.tracking_server.TrackingServer.log", fail)
        for step in range(10):
            run.metrics({"loss": 1.0}, step)
            wait_for(lambda: "a fault of ours" in caplog.text)
        run.finish("KILLED")
    assert sorted(entry.step for entry in kept(tmp_path) if entry.metrics) == list(range(10))


def test_lines_that_are_no_entries_are_passed_over(
    store: str, begin: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(str(tmp_path / "results"), KEY)
    Spool(place).write([Entry(1, metrics={"loss": 1.0}, step=7)])
    (piece,) = place.pieces()
    whole = Path(piece).read_text()
    Path(piece).write_bytes(b'{"time": 1, "other": 2}\n{"ti\n\xff\n' + whole.encode())
    run = begin(store)
    run.finish("FINISHED")
    assert caplog.text.count("a line is no entry for MLflow") == 3
    assert history(store, str(run.run_id), "loss") == [(7, 1.0)]
    assert not left_files(tmp_path)
    assert Spool(place).read(piece) == [], "another driver has logged and removed it"


def test_uploading_twice_changes_nothing(store: str, begin: Start, tmp_path: Path) -> None:
    first = begin(f"http://127.0.0.1:{free_ports(1)[0]}")
    for step in range(20):
        first.metrics({"loss": 1.0}, step)
    first.finish("KILLED")
    shutil.copytree(tmp_path / "results" / "mlflow", tmp_path / "copy")
    begin(store).finish("KILLED")
    shutil.copytree(tmp_path / "copy", tmp_path / "results" / "mlflow", dirs_exist_ok=True)  # killed before it removed them
    begin(store).finish("KILLED")
    assert len(history(store, only_run(store).info.run_id, "loss")) == 20


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql://u:SECRET@127.0.0.1:port/db", "is no database URI"),
        ("mysql+nodriver://u:SECRET@127.0.0.1/db", "is no database URI"),
        ("mysql+cymysql://u:SECRET@127.0.0.1/db", "needs the Python package cymysql"),
        ("nonsense://u:SECRET@host/x", "sqlite:///file or another database's URI would be right"),
        ("http://u:SECRET@:port", "would be right"),
        ("sqlite:////proc/nowhere/x.db", "cannot be opened"),
    ],
)
def test_a_wrong_uri_is_the_users_to_put_right(begin: Start, uri: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        begin(uri)
    assert message in str(refused.value)
    assert str(refused.value).startswith("MLFLOW_TRACKING_URI ")
    assert "SECRET" not in str(refused.value)


def test_a_job_ends_in_one_line_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchsae_ray.pipelines.train import train

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+cymysql://u:SECRET@127.0.0.1:1/db")
    flags = ["--root_dir", str(tmp_path), *MODEL, "--dataset_path", str(GOLDEN / "images"), *SHORT, "--num_workers", "0"]
    assert run_job(TrainSettings, train, flags) == 2
    said = capsys.readouterr()
    assert said.err == "error: MLFLOW_TRACKING_URI mysql+cymysql://127.0.0.1:1/db needs the Python package cymysql\n"
    assert "SECRET" not in said.out


def test_a_job_goes_on_without_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchsae_ray.pipelines.train import train

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://u:SECRET@127.0.0.1:{free_ports(1)[0]}")
    flags = ["--root_dir", str(tmp_path), *MODEL, "--dataset_path", str(GOLDEN / "images"), *SHORT, "--num_workers", "0"]
    flags += ["--run_name", "run"]
    assert run_job(TrainSettings, train, flags) == 0
    said = capsys.readouterr()
    assert said.out.count("does not answer") == 1
    assert "Connection refused" in said.out
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [data for data in [said.out.encode(), said.err.encode(), *written] if b"SECRET" in data]
    assert list((tmp_path / "out" / "checkpoints" / "run" / "mlflow").glob("spool-*.jsonl"))


def test_secrets_never_reach_a_log_line_or_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: TrainSettings) -> None:
        logging.getLogger("anywhere").warning("cannot open %s", "https://u:SECRET@host/x?sig=SECRET")
        raise UserError("no such file: s3://key:SECRET@bucket/x")

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    assert run_job(TrainSettings, run, []) == 2
    said = capsys.readouterr()
    assert said.out == "cannot open https://u:***@host/x?sig=***\n"
    assert said.err == "error: no such file: s3://key:***@bucket/x\n"
    try:
        raise ValueError("https://u:SECRET@host")
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert "ValueError: https://u:***@host" in capsys.readouterr().err


class MlflowServer:
    """A real server on a sqlite file, that can be killed."""

    def __init__(self, store: str, folder: Path) -> None:
        port = str(free_ports(1)[0])
        self.uri, self._log = f"http://127.0.0.1:{port}", folder / "server.log"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        wait_for(self._answers)

    def _answers(self) -> bool:
        import requests

        assert self._process.poll() is None, self._log.read_text()
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


def test_a_real_server_that_dies_in_the_middle(
    store: str, begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "OPEN_SECONDS", 60.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    server = MlflowServer(store, tmp_path)
    try:
        run = begin(server.uri, lr=0.1)
        run.metrics({"loss": 1.0}, 0)
        wait_for(lambda: history(store, str(run.run_id), "loss"))
        server.kill()
        for step in range(1, 100):
            run.metrics({"loss": 1.0}, step)
        run.finish("KILLED")
        assert {entry.step for entry in kept(tmp_path) if entry.metrics} >= set(range(1, 100))
        assert only_run(store).info.status == "RUNNING"
    finally:
        server.kill()
    again = begin(store, lr=0.2)
    assert again.run_id == run.run_id
    again.finish("FINISHED")
    found = only_run(store)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.1"}
    assert history(store, found.info.run_id, "loss") == [(step, 1.0) for step in range(100)]
    assert not left_files(tmp_path)


def test_an_interrupted_block_is_a_killed_run(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for raised, status in ((KeyboardInterrupt, "KILLED"), (UserError, "FAILED")):
        with pytest.raises(raised), tracked(str(tmp_path), "train", {}, str(tmp_path / "results"), KEY):
            raise raised
        assert only_run(store).info.status == status


def test_a_database_without_its_driver_is_refused_before_anything_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:SECRET@127.0.0.1:1/db")
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI postgresql://127.0.0.1:1/db needs the Python package psycopg"):
        check_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check_store()
