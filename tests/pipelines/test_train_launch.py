"""Workers that die: started again, given up with the cause once nothing comes of it, and faults of ours left as they are."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import train_launch

MEMORY = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node: …")


class Heard:
    """What the driver has heard: a new checkpoint for each of the first attempts."""

    def __init__(self, checkpoints: int) -> None:
        self.saved_step, self.checkpoints, self.attempts = 0, checkpoints, 0

    def while_running(self, work: Callable[[], None], minutes: float) -> None:
        self.attempts += 1
        self.saved_step = 10 * min(self.attempts, self.checkpoints)
        work()


def fit(monkeypatch: pytest.MonkeyPatch, heard: Heard, failures: dict[int, Exception], survive: int = 10**9) -> None:
    """Train with workers that fail in every attempt before `survive`."""

    def failing(*arguments: Any) -> None:
        if heard.attempts < survive:
            raise WorkerGroupError("workers failed", failures)

    monkeypatch.setattr(train_launch, "_fit", failing)
    monkeypatch.setattr(train_launch.ray, "put", lambda value: value)
    monkeypatch.setattr(train_launch.ray, "get", lambda value: value)
    actor = SimpleNamespace(stopped=SimpleNamespace(remote=lambda: ""))
    train_launch._fit_again_and_again(SimpleNamespace(plan=None), actor, heard, 1.0)  # type: ignore[arg-type]


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


def test_a_fault_of_ours_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(checkpoints=0)
    with pytest.raises(WorkerGroupError):
        fit(monkeypatch, heard, {0: RuntimeError("a bug")})
    assert heard.attempts == 1
