"""The objective's parts that the golden steps do not reach, and the schedules."""

import pytest
import torch

from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.objective import Objective, loss_terms, remove_parallel_gradient
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Trainer
from tests.sae.test_ops import make_sae, residual


def terms(sae: SparseAutoencoder, x: torch.Tensor, **settings: float) -> dict[str, float]:
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    found = loss_terms(sae, x, Objective(**settings), dead)  # type: ignore[arg-type]
    return {"mse": found.mse.item(), "l1": found.l1.item(), "l0": found.l0.item()}


def test_definitions() -> None:
    sae, x = make_sae(8, 30, 0), residual(1, 2, 4, 8)
    z = sae.encode(x)
    error = (sae.decode(z) - x) ** 2 / x.norm(dim=-1, keepdim=True)
    found = terms(sae, x, l1_coefficient=0.5)
    assert found["mse"] == pytest.approx(error.mean().item(), rel=1e-6)
    assert found["l1"] == pytest.approx(0.5 * z.sum(dim=-1).mean().item(), rel=1e-6)
    assert found["l0"] == pytest.approx((z > 0).sum(dim=-1).float().mean().item())


def test_cls_coefficient_weighs_token_zero_alone() -> None:
    sae, x = make_sae(8, 30, 0), residual(1, 2, 4, 8)
    error = (sae.decode(sae.encode(x)) - x) ** 2 / x.norm(dim=-1, keepdim=True)
    error[:, 0] *= 5
    assert terms(sae, x, mse_cls_coefficient=5.0)["mse"] == pytest.approx(error.mean().item(), rel=1e-6)


def test_a_decoder_row_is_turned_and_not_stretched() -> None:
    sae = make_sae(8, 30, 0).requires_grad_(True)
    found = loss_terms(sae, residual(1, 2, 4, 8), Objective(), torch.zeros(30, dtype=torch.bool))
    found.total.backward()
    remove_parallel_gradient(sae)
    assert sae.W_dec.grad is not None
    assert (sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max() < 1e-6
    assert sae.W_dec.grad.abs().max() > 1e-6


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    sae = make_sae(8, 30, 0).requires_grad_(True)
    trainer = Trainer(sae, Objective(), Schedule("constant", 10))
    before = sae.W_enc.detach().clone()
    with pytest.raises(FloatingPointError, match="at step 0"):
        trainer.step(torch.full((1, 2, 8), float("nan")))
    assert torch.equal(sae.W_enc.detach(), before)


def test_training_reduces_the_loss() -> None:
    sae = make_sae(8, 64, 0).requires_grad_(True)
    trainer = Trainer(sae, Objective(l1_coefficient=1e-3), Schedule("constant", 200), lr=3e-3)
    x = residual(1, 32, 4, 8)
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
