"""The objective's parts that the golden steps do not reach, and the schedules."""

import math

import pytest
import torch

from patchsae_ray.sae.objective import Objective, loss_terms
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Path, Trainer
from tests.sae.test_ops import make_sae, residual


def test_definitions() -> None:
    sae, x = make_sae(8, 30, 0), residual(1, 10, 8)
    z = sae.encode(x)
    error = (sae.decode(z) - x) ** 2 / x.norm(dim=-1, keepdim=True)
    found = loss_terms(sae, x, Objective(l1_coefficient=0.5))
    assert found.mse.item() == pytest.approx(error.mean().item(), rel=1e-6)
    assert found.l1.item() == pytest.approx(0.5 * z.sum(dim=-1).mean().item(), rel=1e-6)


def test_cls_coefficient_weighs_cls_tokens_alone() -> None:
    sae, x = make_sae(8, 30, 0), residual(1, 10, 8)
    cls = torch.arange(10) % 5 == 0
    error = (sae.decode(sae.encode(x)) - x) ** 2 / x.norm(dim=-1, keepdim=True)
    error[cls] *= 5
    found = loss_terms(sae, x, Objective(mse_cls_coefficient=5.0), cls)
    assert found.mse.item() == pytest.approx(error.mean().item(), rel=1e-6)


def test_terms_of_shares_add_up() -> None:
    sae, x = make_sae(8, 30, 0), residual(1, 10, 8)
    whole = loss_terms(sae, x, Objective())
    shares = [loss_terms(sae, share, Objective(), num_tokens=10) for share in (x[:3], x[3:])]
    assert sum(share.mse.item() for share in shares) == pytest.approx(whole.mse.item(), rel=1e-6)
    assert sum(share.l1.item() for share in shares) == pytest.approx(whole.l1.item(), rel=1e-6)


def test_training_reduces_the_loss() -> None:
    trainer = Trainer(make_sae(8, 64, 0), Objective(l1_coefficient=1e-3), Schedule("constant", 200), lr=3e-3)
    x = residual(1, 128, 8)
    losses = [trainer.step(x).loss for _ in range(200)]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 1, 99: 1}),
        ("constantwithwarmup", {0: 0.1, 4: 0.5, 9: 1, 99: 1}),
        ("linearwarmupdecay", {0: 0.1, 9: 1, 10: 1, 55: 0.5, 99: 1 / 90, 100: 0}),
        ("cosineannealing", {0: 1, 25: 0.853553, 50: 0.5, 75: 0.146447, 100: 0}),
        ("cosineannealingwarmup", {0: 0.1, 9: 1, 10: 1, 55: 0.5, 100: 0}),
        ("cosineannealingwarmrestarts", {0: 1, 24: 0.003943, 25: 1, 50: 1, 75: 1}),
    ],
)
def test_schedules(name: str, expected: dict[int, float]) -> None:
    schedule = Schedule(name, total_steps=100, warm_up_steps=10, restarts=3)  # type: ignore[arg-type]
    assert {step: schedule.factor(step) for step in expected} == pytest.approx(expected, abs=1e-5)


def test_no_warm_up_steps() -> None:
    assert Schedule("constantwithwarmup", 10, warm_up_steps=0).factor(0) == 1


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("perfect", [False, True])
def test_a_token_of_zeros_weighs_nothing(path: Path, perfect: bool) -> None:
    """Its error cannot be divided by its length; with b_dec at 0 and no active latent its reconstruction is exact besides."""
    states = []
    for rows in ([0, 1, 2], [1, 2]):
        sae = make_sae(8, 30, 0)
        if perfect:
            sae.b_dec.data.zero_()
            sae.b_enc.data.fill_(-1e-3)
        trainer = Trainer(sae, Objective(l1_coefficient=0.0), Schedule("constant", 9), path=path, dead_feature_window=0)
        x = torch.stack([torch.zeros(8), *residual(1, 2, 8)])[rows]
        metrics = [trainer.step(x, x.norm(dim=1) == 0) for _ in range(3)]
        assert all(math.isfinite(one.loss) for one in metrics)
        assert metrics[-1].ghost > 0, "latents were under ghost gradients"
        states.append((metrics, trainer.state(), trainer.window_result()))
    (with_zeros, state, window), (without, other, alone) = states
    assert with_zeros[0].mse_loss == pytest.approx(without[0].mse_loss * 2 / 3, rel=1e-6), "it is among the tokens of the mean"
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    assert set(state) == set(other)
    assert window.mse == pytest.approx(alone.mse * 2 / 3, rel=0.05)
    for value in window.as_metrics().values():
        assert math.isfinite(value)
