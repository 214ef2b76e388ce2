"""Waits for tasks of Ray end, or say what they wait for; Ray itself is a stand-in."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions as exceptions

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import cluster, merging, progress
from patchsae_ray.pipelines import waves as waves_module
from patchsae_ray.pipelines.bundles import Bundle, BundleFolder
from patchsae_ray.pipelines.manifests import ManifestTasks
from patchsae_ray.pipelines.merging import Helpers, Receipt, merged_contents
from patchsae_ray.pipelines.progress import Patience, ProgressLines
from patchsae_ray.pipelines.waves import Waves
from tests.benchmarks.pipeline import Totals


class Tasks:
    """In Ray's place: tasks that are done after so many waits, at once or never, and then give or raise something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waits: float, result: Any = None) -> None:
        self.waits, self.result, self.submitted = waits, result, 0
        for name in ("remote", "wait", "get", "cancel"):
            monkeypatch.setattr(ray, name, getattr(self, name))
        monkeypatch.setattr(ray, "available_resources", dict)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        return lambda function: SimpleNamespace(remote=self.submit)

    def submit(self, *given: Any) -> int:
        self.submitted += 1
        return self.submitted

    def wait(self, running: list[Any], num_returns: int = 1, timeout: float | None = None, **given: Any) -> Any:
        assert timeout is not None, "for ever"
        self.waits -= 1
        return (running[:1], running[1:]) if self.waits < 0 else ([], running)

    def get(self, reference: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def cancel(self, reference: Any) -> None:
        return


class Clock:
    """Seconds that pass with each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
        self.now, self.step = 0.0, step
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=self))

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def waves(quiet: float) -> Waves:
    made = Waves("extract", *[None] * 7, 1.0, 60.0, None)  # type: ignore[arg-type]
    made.progress = SimpleNamespace(quiet_seconds=lambda: quiet, moved=lambda: None)  # type: ignore[assignment]
    made._running = dict.fromkeys(range(5), 32)
    return made


@pytest.mark.parametrize("most", [0, 4])
def test_combining_tasks_that_hang_are_given_up(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Tasks(monkeypatch, waits=math.inf)
    with pytest.raises(UserError, match=r"extract: nothing was done for 1 min 01 s \(--no_progress_minutes\)"):
        list(waves(quiet=61.0)._finished(most))


def test_combining_tasks_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = Receipt((1,), 512, (), ())
    Tasks(monkeypatch, waits=3, result=receipt)
    assert list(waves(quiet=59.0)._finished(0)) == [receipt] * 5
    Tasks(monkeypatch, waits=math.inf)
    assert list(waves(quiet=61.0)._finished(5)) == [], "no more are at work than may be"


class Ledger:
    """A ledger of this process, whose own may have ended."""

    def __init__(self, images: int) -> None:
        self.images, self.asked_in_vain, self.dead = images, threading.Event(), False
        self.desks: list[Any] = []
        self.total = SimpleNamespace(remote=lambda: self._images)
        self.open_desk = SimpleNamespace(remote=lambda desk: lambda: self._open(desk))

    def _images(self) -> int:
        self._answer()
        return self.images

    def _open(self, desk: Any) -> None:
        self._answer()
        self.desks.append(desk)

    def _answer(self) -> None:
        if self.dead:
            self.asked_in_vain.set()
            raise exceptions.ActorDiedError


def until(seen: Callable[[], bool]) -> None:
    """Wait; where it is not seen, what is asserted after says so."""
    deadline = time.monotonic() + 20
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_ledger_whose_process_ends_is_followed_by_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer())
    for name in ("FIRST_LINE_SECONDS", "LINE_SECONDS"):
        monkeypatch.setattr(progress, name, 0.01)
    ledgers = [Ledger(300), Ledger(200)]
    monkeypatch.setattr(waves_module, "start_ledger", lambda num_units: ledgers[1])
    told: list[float] = []
    made = Waves("extract", SimpleNamespace(units=range(2)), *[None] * 6, 1.0, 60.0, None)  # type: ignore[arg-type]
    made._ledger = ledgers[0]
    with ProgressLines("extract", 1000, 0, ledgers[0], lambda said: told.append(said["images_done"])) as made.progress:
        until(lambda: 300 in told)
        ledgers[0].dead = True
        assert ledgers[0].asked_in_vain.wait(20)
        desk: Any = object()
        made._open_desk(desk)
        until(lambda: 500 in told)
    assert set(told) == {300.0, 500.0}
    assert (ledgers[0].desks, ledgers[1].desks) == ([], [desk])


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Iterator[Any]]:
    monkeypatch.setattr(merging, "MERGE_FAN_IN", 2)
    bundles = [Bundle(f"{unit}", (unit,)) for unit in range(8)]
    where = Helpers(None, 0, 0, 2)
    return lambda: merged_contents(BundleFolder(str(tmp_path), 8), Totals, bundles, where, Patience("extract", 2.0))


def test_merging_tasks_that_hang_are_said_and_given_up(
    merge: Callable[[], Iterator[Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Tasks(monkeypatch, waits=math.inf)
    Clock(monkeypatch, step=20.0)
    with pytest.raises(UserError, match=r"extract: nothing was done for 2 min 20 s \(--no_progress_minutes\)"):
        list(merge())
    assert caplog.messages == [
        "extract: nothing done for 1 min 00 s, waiting for one of 2 tasks that merge bundles",
        "extract: nothing done for 2 min 00 s, waiting for one of 2 tasks that merge bundles",
    ]


def test_merging_tasks_that_went_with_their_machines_are_one_line(
    merge: Callable[[], Iterator[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Tasks(monkeypatch, waits=0, result=exceptions.NodeDiedError("node 12 died"))
    with pytest.raises(UserError, match=r"the merging of bundles went with a machine .*: node 12 died\); the same command"):
        list(merge())


@pytest.fixture
def manifest_tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the cluster before there are tasks."""
    asked: list[str] = []
    monkeypatch.setattr(cluster, "connect", lambda address: asked.append("connect"))
    monkeypatch.setattr(cluster, "several_machines", lambda: True)
    monkeypatch.setattr(cluster, "wait_for_cpus", lambda: asked.append("cpus"))
    return asked


def test_manifest_tasks_wait_for_a_machine_with_cpus_and_say_what_they_wait_for(
    manifest_tasks: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Tasks(monkeypatch, waits=4, result="rows")
    Clock(monkeypatch, step=20.0)
    assert list(ManifestTasks(None, "s3://bucket/root")(str, range(20))) == ["rows"] * 20
    assert manifest_tasks == ["connect", "cpus"]
    what = "20 tasks that list the data set (0 of the cluster's 8 CPUs are free)"
    assert caplog.messages == [f"manifest: nothing done for 1 min 00 s, waiting for {what}"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exceptions.NodeDiedError("node 12 died"), "a task that lists the data set went with a machine .*: node 12 died"),
        (exceptions.WorkerCrashedError(), "a task that lists the data set went with a machine or process each time"),
        (exceptions.OutOfMemoryError("node 12 was low on memory"), "node 12 was low on memory"),
        (exceptions.RayTaskError("list", "Traceback", UserError("07.tar is not whole")), r"^07\.tar is not whole$"),
    ],
)
@pytest.mark.usefixtures("manifest_tasks")
def test_manifest_tasks_that_ray_gives_up_are_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Tasks(monkeypatch, waits=0, result=error)
    with pytest.raises(UserError, match=said):
        list(ManifestTasks(None, "s3://bucket/root")(str, range(20)))
