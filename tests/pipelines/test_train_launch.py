"""Workers that die: started again, given up with the cause once nothing comes of it, and faults of ours left as they are."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import train_launch

MEMORY = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node: …")


LOST = ray.exceptions.NodeDiedError("Node 10.0.0.7 died")


@dataclass(frozen=True)
class Plan:
    num_workers: int = 4
    worker_cpus: float = 2.0
    worker_gpus: float = 1.0


@dataclass(frozen=True)
class Job:
    plan: Plan


class Heard:
    """What the driver has heard: a new checkpoint for each of the first attempts."""

    def __init__(self, checkpoints: int) -> None:
        self.saved_step, self.checkpoints, self.attempts = 0, checkpoints, 0

    def while_running(self, work: Callable[[], None], minutes: float) -> None:
        self.attempts += 1
        self.saved_step = 10 * min(self.attempts, self.checkpoints)
        work()


def fit(
    monkeypatch: pytest.MonkeyPatch, heard: Heard, failures: dict[int, Exception], survive: int = 10**9, room: int = 4
) -> list[int]:
    """Train with workers that fail in every attempt before `survive`. Returns the number of workers of each attempt."""
    workers = []

    def failing(plan: Plan, *arguments: Any) -> None:
        workers.append(plan.num_workers)
        if heard.attempts < survive:
            raise WorkerGroupError("workers failed", failures)

    node = {"Alive": True, "Resources": {"CPU": 2.0 * room, "GPU": 8.0}}
    monkeypatch.setattr(train_launch.ray, "nodes", lambda: [node, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    monkeypatch.setattr(train_launch, "ROOM_SECONDS", 0.0)

    monkeypatch.setattr(train_launch, "_fit", failing)
    monkeypatch.setattr(train_launch.ray, "put", lambda value: value)
    monkeypatch.setattr(train_launch.ray, "get", lambda value: value)
    actor = SimpleNamespace(stopped=SimpleNamespace(remote=lambda: ""))
    train_launch._fit_again_and_again(Job(Plan()), actor, heard, 1.0)  # type: ignore[arg-type]
    return workers


def test_workers_out_of_memory_are_named_once_nothing_comes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(checkpoints=4)
    says = r"died 3 times without a new checkpoint, the last time: training worker 1 died \(Task was killed due to the node"
    with pytest.raises(UserError, match=says):
        fit(monkeypatch, heard, {0: RuntimeError("connection closed by peer"), 1: MEMORY})
    assert heard.attempts == 4 + 2


def test_a_death_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(checkpoints=1)
    fit(monkeypatch, heard, {1: SimpleNamespace(health_check_failure=MEMORY)}, survive=3)  # type: ignore[dict-item]
    assert heard.attempts == 3


def test_lost_machines_are_no_deaths_and_the_run_goes_on_with_fewer_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard(checkpoints=0)
    assert fit(monkeypatch, heard, {2: LOST}, survive=6, room=3) == [4, 3, 3, 3, 3, 3]
    assert "training worker 2 was lost with its machine" in caplog.text
    assert "starting again from the newest checkpoint with 3 of 4 workers" in caplog.text
    with pytest.raises(UserError, match=r"died 3 times without a new checkpoint, the last time: training worker 1 died"):
        fit(monkeypatch, Heard(checkpoints=0), {0: LOST, 1: MEMORY})


def test_a_fault_of_ours_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(checkpoints=0)
    with pytest.raises(WorkerGroupError):
        fit(monkeypatch, heard, {0: RuntimeError("a bug")})
    assert heard.attempts == 1
