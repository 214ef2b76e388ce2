"""The window's metrics against a direct float64 computation, over steps, parts and workers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Path, Trainer
from patchsae_ray.sae.window import LOG_DENSITY_EDGES, TrainingWindow, explained_variance, token_sums
from tests.sae.test_ops import make_sae, residual


def direct(x: Tensor, reconstruction: Tensor, z: Tensor) -> dict[str, float]:
    """From all tokens at once: x, x' [m, d], z [m, s]."""
    x, reconstruction, z = x.double(), reconstruction.double(), z.double()
    error, norm = ((x - reconstruction) ** 2).sum(dim=1), x.norm(dim=1)
    return {
        "num_tokens": len(x),
        "explained_variance": float(1 - error.sum() / ((x - x.mean(dim=0)) ** 2).sum()),
        "explained_variance_legacy": float((1 - error / norm**2).mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(x, reconstruction).mean()),
        "mse": float((error / norm).mean() / x.shape[1]),
        "l0": float((z > 0).double().sum(dim=1).mean()),
        "l1": float(z.sum(dim=1).mean()),
        "dense_share": float(((z > 0).double().mean(dim=0) > 0.1).double().mean()),
    }


def batch(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x', z and `token_sums`."""
    z = sae.encode(x)
    reconstruction = sae.decode(z)
    error, norm = (x - reconstruction).square().sum(dim=1), x.norm(dim=1)
    return reconstruction, z, token_sums(x, reconstruction, error, norm, z.sum(dtype=torch.float64), (z > 0).sum(dim=0))


@pytest.mark.parametrize("cuts", [[0, 90], [0, 1, 40, 90], [0, 30, 60, 90]])
def test_equals_the_direct_computation(cuts: list[int]) -> None:
    sae, x = make_sae(12, 50, 1), residual(2, 90, 12) + 5  # far from zero, so that the mean matters
    windows = []
    for start, end in pairwise(cuts):
        windows.append(TrainingWindow(12, 50))
        windows[-1].update(batch(sae, x[start:end])[2])
    total = TrainingWindow(12, 50)
    total.load_tensors({name: value.clone() for name, value in windows[0].to_tensors().items()})
    for other in windows[1:]:
        total.merge(other)
    found = total.result(dead_share=0.25).as_metrics()
    assert found.pop("dead_share") == 0.25
    assert found == pytest.approx(direct(x, *batch(sae, x)[:2]), rel=1e-5)
    assert found["explained_variance"] < found["explained_variance_legacy"] - 0.1


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_of_a_trainer_with_moving_weights(path: Path) -> None:
    trainer = Trainer(make_sae(12, 50, 1), Objective(), Schedule("constant", 10), 1e-2, 1, accumulate=2, path=path)
    for seeds in (range(3), range(3, 5)):
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for seed in seeds:
            x = residual(seed, 40, 12) + 1
            frozen = {name: value.detach().clone() for name, value in trainer.sae.state_dict().items()}
            frozen["W_dec"] /= frozen["W_dec"].norm(dim=1, keepdim=True)
            sae = SparseAutoencoder.from_tensors(frozen)
            parts.append((x, sae.decode(sae.encode(x)), sae.encode(x)))
            trainer.step(x)
        found = trainer.window_result().as_metrics()
        assert found.pop("dead_share") == int(trainer.dead.sum()) / 50
        x, reconstruction, z = (torch.cat(each) for each in zip(*parts, strict=True))
        assert found == pytest.approx(direct(x, reconstruction, z), rel=1e-4)


def test_log_density() -> None:
    window = TrainingWindow(1, 7)
    counts = torch.tensor([0, 0, 1, 10, 31, 32, 100])
    x = torch.ones(100, 1)
    window.update(token_sums(x, x, x[:, 0] * 0, x[:, 0], torch.zeros((), dtype=torch.float64), counts))
    found = window.result(0.0).log_density
    assert len(found) == len(LOG_DENSITY_EDGES)
    expected = np.zeros(15, dtype=np.int64)
    expected[0] = 2  # never
    for low, number in {-2.0: 1, -1.0: 2, -0.5: 2}.items():  # 31 of 100 lies below a half decade, 32 above
        expected[1 + LOG_DENSITY_EDGES.tolist().index(low)] = number
    assert found.tolist() == expected.tolist()


def test_rarer_than_the_lowest_bin() -> None:
    window = TrainingWindow(1, 2)
    window.values[0], window.values[-1] = 1e9, 1
    assert window.result(0.0).log_density[:2].tolist() == [1, 1]


def test_no_tokens() -> None:
    result = TrainingWindow(3, 4).result(0.5)
    assert result.num_tokens == 0
    assert all(math.isnan(value) for value in (result.explained_variance, result.l0, result.dense_share))
    assert result.log_density.tolist() == [4] + [0] * 14


def test_identical_tokens_have_no_variance_to_explain() -> None:
    sae, token = make_sae(12, 50, 1), residual(2, 1, 12) + 5
    window = TrainingWindow(12, 50)
    for size in (90, 7, 33):
        window.update(batch(sae, token.expand(size, 12).contiguous())[2])
    found = window.result(0.0)
    assert math.isnan(found.explained_variance)
    assert found.mse > 0
    nearly = token + 1e-4 * residual(3, 200, 12)  # far above float32's rounding, far below the length
    window.clear()
    window.update(batch(sae, nearly)[2])
    wanted = direct(nearly, *batch(sae, nearly)[:2])["explained_variance"]
    assert window.result(0.0).explained_variance == pytest.approx(wanted, rel=1e-3)


def test_explained_variance_without_tokens_is_undefined() -> None:
    assert math.isnan(explained_variance(0.0, 0.0, np.zeros(3), 0))
    assert explained_variance(1.0, 10.0, np.array([1.0, 1.0]), 4) == pytest.approx(1 - 1 / (10 - 0.5))
