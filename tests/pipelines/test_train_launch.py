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
from patchsae_ray.pipelines.train_plan import TrainPlan

MEMORY = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node: …")


LOST = ray.exceptions.NodeDiedError("Node 10.0.0.7 died")


FUSED = TrainPlan("cuda", 0, 0, 1.0, 0.0, 1.0, 1, "bf16", 4, 2.0, 1.0, "fused", on_ray=True)
STREAMED = TrainPlan("cuda", 2, 2, 0.9, 1.0, 1.0, 1, "bf16", 2, 1.0, 1.0, "streamed", on_ray=True)


@dataclass(frozen=True)
class Job:
    plan: TrainPlan


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

    def failing(plan: TrainPlan, *arguments: Any) -> None:
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
    train_launch._fit_again_and_again(Job(FUSED), actor, heard, 1.0)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("plan", "nodes", "workers"),
    [
        (FUSED, [(8, 4)], 4),
        (FUSED, [(8, 2), (8, 1)], 3),
        (FUSED, [(3, 4)], 1),
        (STREAMED, [(8, 2), (8, 2)], 2),
        (STREAMED, [(8, 2)], 1),  # the other GPU is for the actor, without which the worker would wait for ever
        (STREAMED, [(4, 1), (4, 1)], 1),
        (STREAMED, [(8, 0)], 1),  # Ray Train waits for a GPU
    ],
)
def test_workers_with_room(
    monkeypatch: pytest.MonkeyPatch, plan: TrainPlan, nodes: list[tuple[float, float]], workers: int
) -> None:
    there = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
    monkeypatch.setattr(train_launch.ray, "nodes", lambda: there)
    monkeypatch.setattr(train_launch, "ROOM_SECONDS", 0.0)
    assert train_launch.workers_with_room(plan) == workers
    fewer = plan.with_workers(workers)
    assert (fewer.num_workers, fewer.min_actors) == (workers, plan.min_actors * workers // plan.num_workers)


def test_a_fault_of_ours_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(checkpoints=0)
    with pytest.raises(WorkerGroupError):
        fit(monkeypatch, heard, {0: RuntimeError("a bug")})
    assert heard.attempts == 1
