"""One driver at a time trains a run: another waits, goes on where the first has died, and removes nothing under it."""

import json
import threading
from pathlib import Path

import pytest

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import heartbeat, train_claim
from patchsae_ray.pipelines.heartbeat import Heartbeat
from patchsae_ray.pipelines.resume import ResumeFolder
from patchsae_ray.pipelines.train_claim import check_nobody_trains, sole_driver


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResumeFolder:
    monkeypatch.setattr(train_claim, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "DEAD_AFTER_SECONDS", 0.5)
    return ResumeFolder(str(tmp_path / "resume"), "k" * 32, {})


def test_a_second_driver_waits_until_the_first_has_ended(resume: ResumeFolder) -> None:
    order: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with sole_driver(resume, lambda: False):
            order.append("first in")
            entered.set()
            leave.wait(10)
            order.append("first out")

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    threading.Timer(0.3, leave.set).start()
    with sole_driver(resume, lambda: False):
        order.append("second in")
    thread.join()
    assert order == ["first in", "first out", "second in"]


def test_a_driver_that_waited_for_the_end_of_the_run_says_so(resume: ResumeFolder) -> None:
    with (
        sole_driver(resume, lambda: False),
        pytest.raises(UserError, match="another driver has finished this run"),
        sole_driver(resume, lambda: True),
    ):
        raise AssertionError("two drivers at once")


def dead_driver(resume: ResumeFolder, turn: int = 0) -> None:
    """What a driver on another machine leaves behind that was killed."""
    own = Path(resume.own)
    own.mkdir(parents=True)
    (own / "alive-abcd1234.json").write_text(json.dumps({"host": "far", "pid": 1, "machine": "other", "beats": 3}))
    (own / f"claim-000000.{turn}").write_text(json.dumps({"driver": "abcd1234"}))


def test_a_dead_drivers_run_is_gone_on_with_once_it_has_been_silent(
    resume: ResumeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dead_driver(resume)
    with sole_driver(resume, lambda: False):
        assert (Path(resume.own) / "claim-000000.1").exists()
    assert "a driver on far trains this run; waiting until it is done, or gone" in caplog.text


def test_checkpoints_are_not_taken_away_under_a_living_driver(resume: ResumeFolder) -> None:
    check_nobody_trains(resume)
    with Heartbeat(resume.own), pytest.raises(UserError, match=r"trains there; --overwrite would take its checkpoints away"):
        check_nobody_trains(resume)
    check_nobody_trains(resume)


def test_a_dead_drivers_checkpoints_may_go(resume: ResumeFolder) -> None:
    dead_driver(resume)
    check_nobody_trains(resume)
