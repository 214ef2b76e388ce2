"""One driver at a time trains a run: another waits, goes on where the first has died, and removes nothing under it."""

import json
import threading
from pathlib import Path

import pytest
import torch

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import heartbeat, train_claim
from patchsae_ray.pipelines.heartbeat import Heartbeat, check_nobody_works
from patchsae_ray.pipelines.resume import ResumeFolder
from patchsae_ray.pipelines.train_claim import sole_driver
from patchsae_ray.writing import remove_tree


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResumeFolder:
    monkeypatch.setattr(train_claim, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "DEAD_AFTER_SECONDS", 0.5)
    return ResumeFolder(str(tmp_path / "resume"), "k" * 32, {})


class Run:
    """What two drivers of one run do, and whether its results are committed."""

    def __init__(self, resume: ResumeFolder) -> None:
        self.resume, self.committed = resume, False
        self.said: list[str] = []

    def drive(self, name: str, trained: threading.Event, commit: threading.Event) -> None:
        """Train, commit, and remove the checkpoints, as a job does."""
        try:
            with sole_driver(self.resume.own, lambda: self.committed):
                self.said.append(f"{name} trains")
                trained.set()
                commit.wait(10)
                self.committed = True
            remove_tree(self.resume.own)
        except UserError as error:
            self.said.append(f"{name}: {error}")


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_second_driver_waits_and_does_not_train_what_the_first_has_finished(resume: ResumeFolder, pause: float) -> None:
    run, trained, commit = Run(resume), threading.Event(), threading.Event()
    first = threading.Thread(target=run.drive, args=("first", trained, commit))
    second = threading.Thread(target=run.drive, args=("second", threading.Event(), commit))
    first.start()
    trained.wait(10)
    second.start()
    threading.Timer(pause, commit.set).start()
    first.join(20)
    second.join(20)
    assert run.said == ["first trains", "second: train: another driver has finished this run"]
    assert not list(Path(resume.uri).rglob("*.*"))


def test_a_second_driver_goes_on_where_the_first_has_failed(resume: ResumeFolder) -> None:
    with pytest.raises(KeyboardInterrupt), sole_driver(resume.own, lambda: False):
        raise KeyboardInterrupt
    with sole_driver(resume.own, lambda: False):
        assert (Path(resume.own) / "claim-000000.1").exists()


def test_checkpoints_are_cleared_and_not_who_is_at_work(resume: ResumeFolder) -> None:
    other = ResumeFolder(resume.uri, "o" * 32, {})
    other.save(3, {"W_enc": torch.zeros(2)})
    resume.save(5, {"W_enc": torch.zeros(2)})
    with sole_driver(resume.own, lambda: False):
        resume.clear()
        names = {path.name.split("-")[0] for path in Path(resume.uri).rglob("*.*")}
    assert names == {"alive", "claim"}


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
    with sole_driver(resume.own, lambda: False):
        assert (Path(resume.own) / "claim-000000.1").exists()
    assert "a driver on far trains this run; waiting until it is done, or gone" in caplog.text


def test_checkpoints_are_not_taken_away_under_a_living_driver(resume: ResumeFolder) -> None:
    check_nobody_works(resume.uri)
    with Heartbeat(resume.own), pytest.raises(UserError, match=r"is at work there; --overwrite would take its files"):
        check_nobody_works(resume.uri)
    check_nobody_works(resume.uri)


def test_a_dead_drivers_checkpoints_may_go(resume: ResumeFolder) -> None:
    dead_driver(resume)
    check_nobody_works(resume.uri)
