"""Workers of a gloo group, with unequal and empty shares, against one worker with the whole batch."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from patchsae_ray.sae.collective import Alone, Collective, Distributed, gathered
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Path as GradientPath
from patchsae_ray.sae.trainer import Trainer
from tests.sae.test_ops import make_sae, residual

TOKENS, WIDTH, LATENTS, STEPS = 400, 32, 128, 20
SHARES = {2: (0.7, 0.3), 4: (0.0, 0.15, 0.35, 0.5)}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_trainer(collective: Collective, path: GradientPath = "auto") -> Trainer:
    sae = make_sae(WIDTH, LATENTS, 0)
    sae.b_enc.sub_(0.7)  # so that some latents fire rarely, and ghosts come and go
    schedule = Schedule("constantwithwarmup", STEPS, warm_up_steps=5)
    return Trainer(sae, Objective(1e-3, 2.0), schedule, 4e-4, 2, collective=collective, path=path)


def cuts(step: int, size: int) -> list[int]:
    """Where each worker's share of the tokens starts and ends; the shares change hands every step."""
    shares = torch.tensor(SHARES.get(size, (1.0,))).roll(step)
    return [0, *(shares.cumsum(0) * TOKENS).round().int().tolist()]


def train(collective: Collective, path: GradientPath = "auto") -> dict[str, Any]:
    """20 steps; what every worker then knows."""
    trainer, metrics = make_trainer(collective, path), []
    for step in range(STEPS):
        x, cls = residual(step, TOKENS, WIDTH), torch.arange(TOKENS) % 5 == 0
        share = slice(*cuts(step, collective.size)[collective.rank : collective.rank + 2])
        metrics.append(asdict(trainer.step(x[share], cls[share], TOKENS, flag=collective.rank)))
    state = {name: value.clone() for name, value in trainer.state().items()}
    return {"state": state, "metrics": metrics, "window": trainer.window_result().as_metrics()}


def raised(collective: Collective) -> str:
    """What a NaN on the last worker alone raises here."""
    x = residual(0, TOKENS, WIDTH)[: 10 + collective.rank]
    if collective.rank == collective.size - 1:
        x[0, 0] = float("nan")
    try:
        make_trainer(collective).step(x, num_tokens=sum(10 + rank for rank in range(collective.size)))
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def sums(collective: Collective) -> dict[str, torch.Tensor]:
    found = {}
    for dtype in (torch.int64, torch.float32, torch.float64, torch.bfloat16):
        found[str(dtype)] = torch.full((3,), collective.rank + 1).to(dtype)
        collective.sum_(found[str(dtype)])
    return found


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", timedelta(seconds=120), size, rank)
    exact = Distributed()
    found: dict[str, Any] = {"dense": train(exact, "dense"), "sparse": train(exact, "sparse"), "sums": sums(exact)}
    found |= {"compressed": train(Distributed(compress=True), "sparse"), "raised": raised(exact)}
    values = np.arange(rank * 10, rank * 10 + 2 * rank)  # none of rank 0
    found["gathered"] = torch.from_numpy(gathered(exact, values, "cpu"))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train(Alone())


@pytest.fixture(scope="module", params=[2, 4])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"workers{request.param}")
    mp.spawn(worker, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def change(found: dict[str, Any], name: str) -> torch.Tensor:
    before = make_trainer(Alone()).state()[name]
    return found["state"][name] - before


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_many_workers_are_one(workers: list[dict[str, Any]], alone: dict[str, Any], path: str) -> None:
    assert any(step["ghost"] for step in alone["metrics"])
    found = workers[0][path]
    for name in WEIGHTS:
        assert change(alone, name).abs().max() > 1e-3
        assert (found["state"][name] - alone["state"][name]).abs().max() < 2e-6, name
    assert torch.equal(found["state"]["batches_since_fired"], alone["state"]["batches_since_fired"])
    counts, expected = found["state"]["firing_counts"], alone["state"]["firing_counts"]
    assert (counts - expected).abs().sum() <= 1e-5 * expected.sum()
    assert found["window"] == pytest.approx(alone["window"], rel=1e-4)
    size = len(workers)
    for ours, one in zip(found["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx({**one, "flag": size * (size - 1) // 2}, rel=1e-4)


@pytest.mark.parametrize("path", ["dense", "sparse", "compressed"])
def test_workers_stay_alike(workers: list[dict[str, Any]], path: str) -> None:
    for other in workers[1:]:
        assert other[path]["metrics"] == workers[0][path]["metrics"]
        assert other[path]["window"] == workers[0][path]["window"]
        assert all(torch.equal(value, other[path]["state"][name]) for name, value in workers[0][path]["state"].items())


def test_bf16_gradients_stay_close(workers: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name in WEIGHTS:
        exact, found = change(alone, name), change(workers[0]["compressed"], name)
        assert 1e-5 < ((found - exact).norm() / exact.norm()).item() < 0.03, name


def test_a_bad_batch_on_one_worker_raises_on_all(workers: list[dict[str, Any]]) -> None:
    assert {worker["raised"] for worker in workers} == {"the loss is nan at step 0"}


def test_values_of_all_workers_end_to_end(workers: list[dict[str, Any]]) -> None:
    expected = [value for rank in range(len(workers)) for value in range(rank * 10, rank * 10 + 2 * rank)]
    assert all(found["gathered"].tolist() == expected for found in workers)
    assert gathered(Alone(), np.array([3, 1]), "cpu").tolist() == [3, 1]


def test_sums_of_every_type(workers: list[dict[str, Any]]) -> None:
    size = len(workers)
    for found in workers:
        for dtype, value in found["sums"].items():
            assert str(value.dtype) == dtype
            assert value.tolist() == [size * (size + 1) / 2] * 3
