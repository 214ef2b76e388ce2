"""Steps: an exact resume, parts, the choice of a path, what a bad batch leaves behind."""

import math

import pytest
import torch
from torch import Tensor

from patchsae_ray.sae import trainer as module
from patchsae_ray.sae.gradients import Batch, Pass
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Path, Trainer
from tests.sae.test_ops import make_sae, residual


def make_trainer(path: Path = "auto", accumulate: int = 1, seed: int = 0) -> Trainer:
    schedule = Schedule("constantwithwarmup", 20, warm_up_steps=4)
    objective = Objective(1e-3, mse_cls_coefficient=3.0)
    return Trainer(make_sae(16, 80, seed), objective, schedule, 1e-2, dead_feature_window=1, accumulate=accumulate, path=path)


def run(trainer: Trainer, steps: range) -> list[module.StepMetrics]:
    cls = torch.arange(50) % 5 == 0
    return [trainer.step(residual(step, 50, 16), cls) for step in steps]


def same(ours: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return ours.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in ours.items())


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_resumed_run_is_the_same_bit_for_bit(path: Path) -> None:
    whole = make_trainer(path)
    metrics = run(whole, range(6))
    assert metrics[-1].ghost > 0
    first = make_trainer(path)
    run(first, range(3))
    kept = {name: value.clone() for name, value in first.state().items()}
    run(first, range(3, 4))
    assert not same(kept, first.state())
    second = make_trainer(path, seed=9)
    second.load_state(kept)
    assert same(kept, second.state())
    assert run(second, range(3, 6)) == metrics[3:]
    assert same(whole.state(), second.state())
    assert whole.window_result().as_metrics() == second.window_result().as_metrics()


def test_state_has_flat_names_and_plain_shapes() -> None:
    trainer = make_trainer()
    shapes = {"W_enc": (16, 80), "b_enc": (80,), "W_dec": (80, 16), "b_dec": (16,)}
    found = {name: tuple(value.shape) for name, value in trainer.state().items()}
    adam = {f"adam.{key}.{name}": shape for key in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    counters = dict.fromkeys(("batches_since_fired", "firing_counts", "window.counts"), (80,))
    scalars: dict[str, tuple[int, ...]] = dict.fromkeys(("adam.step", "step", "density"), ())
    assert found == {**shapes, **adam, **counters, **scalars, "window.totals": (7,), "window.sums": (16,)}
    assert all(value.is_contiguous() for value in trainer.state().values())


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_parts_make_the_same_step(path: Path) -> None:
    whole, parts = make_trainer(path), make_trainer(path, accumulate=4)
    for one, other in zip(run(whole, range(5)), run(parts, range(5)), strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-5)
    for name, weight in whole.sae.named_parameters():
        assert torch.allclose(weight, getattr(parts.sae, name), atol=1e-5), name
    assert torch.equal(whole.firing_counts, parts.firing_counts)
    assert whole.window_result().as_metrics() == pytest.approx(parts.window_result().as_metrics(), rel=1e-5)


def test_a_step_turns_decoder_rows_and_does_not_stretch_them() -> None:
    trainer = make_trainer("sparse")
    seen: list[Tensor] = []
    trainer._optimiser.register_step_pre_hook(lambda *_: seen.append(trainer.sae.W_dec.grad.clone()))  # type: ignore[union-attr]
    for step in range(4):
        rows = trainer.sae.W_dec.detach() / trainer.sae.W_dec.detach().norm(dim=1, keepdim=True)
        metrics = run(trainer, range(step, step + 1))[0]
        assert (seen[-1] * rows).sum(dim=1).abs().max() < 1e-6 < seen[-1].abs().max()
    assert metrics.ghost > 0


def test_path_follows_the_density_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noting(name: str) -> None:
        real = getattr(module, name)

        def noted(sae: SparseAutoencoder, batch: Batch, objective: Objective) -> Pass:
            taken.append(name)
            return real(sae, batch, objective)

        monkeypatch.setattr(module, name, noted)

    noting("dense_pass")
    noting("sparse_pass")
    trainer = make_trainer()
    run(trainer, range(1))
    density = trainer.density
    assert density == pytest.approx(float(trainer.firing_counts.sum()) / (50 * 80))
    monkeypatch.setitem(module.SPARSE_BELOW["cpu"], "fp32", density * 1.01)
    run(trainer, range(1, 2))
    monkeypatch.setitem(module.SPARSE_BELOW["cpu"], "fp32", 0.0)
    run(trainer, range(2, 3))
    assert taken == ["dense_pass", "sparse_pass", "dense_pass"]


@pytest.mark.parametrize(("precision", "sparse"), [("fp32", True), ("bf16", False)])
def test_on_a_gpu_the_choice_depends_on_the_precision(precision: str, sparse: bool) -> None:
    trainer = make_trainer()
    trainer.density = 0.005  # between the two bounds: the dense products of bf16 are the faster ones
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        assert trainer._sparse("cuda") is sparse
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_loss_that_is_not_finite_teaches_nothing(path: Path) -> None:
    trainer = make_trainer(path)
    run(trainer, range(2))
    before = {name: value.clone() for name, value in trainer.state().items() if name != "W_dec"}
    rows = trainer.sae.W_dec.detach() / trainer.sae.W_dec.detach().norm(dim=1, keepdim=True)
    x = residual(7, 50, 16)
    x[3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer.step(x)
    after = trainer.state()
    assert torch.allclose(after.pop("W_dec"), rows, atol=1e-6)
    assert same(before, after)


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="num_tokens is 60, the workers hold 50 tokens"):
        make_trainer().step(residual(0, 50, 16), num_tokens=60)
    with pytest.raises(ValueError, match="needs a token"):
        make_trainer().step(residual(0, 0, 16))


def test_flag_and_flops() -> None:
    trainer = make_trainer("sparse")
    metrics = trainer.step(residual(0, 50, 16), flag=3)
    assert metrics.flag == 3
    assert trainer.flops_last_step == pytest.approx(2 * 50 * 16 * 80 + 8 * 16 * 50 * metrics.l0)
    assert math.isclose(metrics.loss, metrics.mse_loss + metrics.l1_loss + metrics.mse_loss_ghost_resid)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_batch_too_large_for_memory_goes_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make_trainer(path), make_trainer(path)
    run(whole, range(2))
    run(parts, range(1))
    sizes: list[int] = []
    step = parts._run
    monkeypatch.setattr(parts, "_run", lambda batch, seen: (sizes.append(len(batch.x)), step(batch, seen))[1])
    monkeypatch.setattr(parts, "_part_bytes", 8400)
    run(parts, range(1, 2))
    assert len(sizes) > 3
    for name, weight in whole.sae.named_parameters():
        assert torch.allclose(weight, getattr(parts.sae, name), atol=1e-5), name
