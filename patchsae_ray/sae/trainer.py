"""Training steps on batches of residuals: PatchSAE's recipe, one step at a time, in plain torch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchsae_ray.sae.model import SparseAutoencoder, normalise_decoder
from patchsae_ray.sae.objective import Objective, loss_terms, remove_parallel_gradient
from patchsae_ray.sae.schedules import Schedule


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw before it moved the weights. Names as in PatchSAE's log."""

    mse_loss: float
    l1_loss: float
    mse_loss_ghost_resid: float
    loss: float
    l0: float
    ghost: int
    """Latents under ghost gradients in this step."""


@dataclass
class Trainer:
    """The autoencoder with its optimiser, schedule and dead-latent counters.

    A step: decoder rows to unit length, forward, backward, the gradient's part along each decoder row removed, Adam,
    then the schedule.
    """

    sae: SparseAutoencoder
    objective: Objective
    schedule: Schedule
    lr: float = 4e-4
    dead_feature_window: int = 64
    """A latent is dead after firing on no token for more than this many batches."""
    has_cls: bool = True
    step_index: int = 0
    batches_since_fired: Tensor = field(init=False)
    """[s] int64."""

    def __post_init__(self) -> None:
        device = self.sae.W_enc.device
        self.batches_since_fired = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=self.lr * self.schedule.factor(0))

    @property
    def dead(self) -> Tensor:
        """[s] bool: latents that fired on no token for more than `dead_feature_window` batches."""
        return self.batches_since_fired > self.dead_feature_window

    def step(self, x: Tensor) -> StepMetrics:
        """One step on residuals x [n, t, d].

        Raises: FloatingPointError where the loss is not finite; nothing is then learned from the batch.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * self.schedule.factor(self.step_index)
        normalise_decoder(self.sae)
        dead = self.dead if self.objective.use_ghost_grads else torch.zeros_like(self.batches_since_fired, dtype=torch.bool)
        terms = loss_terms(self.sae, x, self.objective, dead, self.has_cls)
        loss = terms.total
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step_index}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        remove_parallel_gradient(self.sae)
        self.optimiser.step()
        self.step_index += 1
        self.batches_since_fired += 1
        self.batches_since_fired[terms.fired] = 0
        return StepMetrics(
            mse_loss=terms.mse.item(),
            l1_loss=terms.l1.item(),
            mse_loss_ghost_resid=terms.ghost.item(),
            loss=loss.item(),
            l0=terms.l0.item(),
            ghost=int(dead.sum()),
        )
