"""The trainer finds the directions that made the data."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from patchsae_ray.sae.model import SparseAutoencoder, geometric_median, initialise
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Trainer
from patchsae_ray.settings import TrainSettings

DIRECTIONS, WIDTH, ACTIVE, TOKENS, STEPS = 256, 64, 4, 256, 13_000
L1_WIDTH = 768
"""Width for which the default L1 coefficient is meant. The mse is a mean over d and the L1 term is not, so that the same
balance at another width has the coefficient times 768 / d."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(directions: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[m, d]: sums of about 4 directions each, amplitudes uniform in [0.5, 1.5); tokens of none are left out."""
    on = torch.rand(count, len(directions), generator=generator) < ACTIVE / len(directions)
    amplitudes = on * (0.5 + torch.rand(count, len(directions), generator=generator))
    return amplitudes[on.any(dim=1)] @ directions


def test_directions_are_found() -> None:
    recipe = TrainSettings()
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator), dim=1)
    pool = tokens(directions, 100_000, generator)
    sae = SparseAutoencoder(WIDTH, 8 * WIDTH)
    initialise(sae, generator)
    sae.b_dec.data = geometric_median(pool[:4096])
    objective = Objective(recipe.l1_coefficient * L1_WIDTH / WIDTH, recipe.mse_cls_coefficient, recipe.use_ghost_grads)
    schedule = Schedule(recipe.lr_scheduler_name, STEPS, recipe.lr_warm_up_steps)
    trainer = Trainer(sae, objective, schedule, recipe.lr, recipe.dead_feature_window)

    def found() -> float:
        """Mean over the true directions of the largest cosine to a decoder row."""
        return float((directions @ normalize(sae.W_dec.detach(), dim=1).T).amax(dim=1).mean())

    assert found() < 0.45
    for _ in range(STEPS):
        trainer.step(pool[torch.randint(len(pool), (TOKENS,), generator=generator)])
    assert found() >= 0.95
