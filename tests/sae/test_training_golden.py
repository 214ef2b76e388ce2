"""Six training steps against the released code's, on both paths: every loss term, and the change of every parameter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from patchsae_ray.sae.checkpoint import load_sae
from patchsae_ray.sae.model import SparseAutoencoder, normalise_decoder
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import StepMetrics, Trainer
from tests.conftest import GOLDEN

Trained = tuple[Trainer, list[StepMetrics]]


@pytest.fixture(scope="module")
def steps() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / "train_steps.safetensors")


def start() -> SparseAutoencoder:
    return load_sae(str(GOLDEN / "sae.pt")).requires_grad_(True)


@pytest.fixture(scope="module", params=["dense", "sparse"])
def trained(request: pytest.FixtureRequest, steps: dict[str, torch.Tensor]) -> Trained:
    schedule = Schedule("constantwithwarmup", total_steps=1000, warm_up_steps=500)
    trainer = Trainer(start(), Objective(l1_coefficient=8e-5), schedule, 4e-4, dead_feature_window=2, path=request.param)
    return trainer, [trainer.step(steps[f"batch_{index}"].flatten(0, 1)) for index in range(6)]


def test_loss_terms(trained: Trained) -> None:
    log = json.loads((GOLDEN / "expected" / "train_log.json").read_text())
    assert [step["ghost"] for step in log] == [0, 0, 0, 238, 129, 117]
    for metrics, expected in zip(trained[1], log, strict=True):
        for name, value in expected.items():
            assert getattr(metrics, name) == pytest.approx(value, rel=1e-5, abs=1e-12), name


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_change_of_parameters(trained: Trained, steps: dict[str, torch.Tensor], name: str) -> None:
    before = start()
    normalise_decoder(before)
    ours = (getattr(trained[0].sae, name) - getattr(before, name)).detach()
    golden = steps[f"after_{name}"] - getattr(before, name).detach()
    assert golden.abs().max() > 1e-5
    difference = (ours - golden).abs()
    # Adam divides by a gradient's own size: where that is rounding, another order of its terms moves the weight otherwise
    assert difference.max() < (1e-7 if trained[0].path == "dense" else 1e-6)
    assert (difference > 1e-7).float().mean() < 1e-4
