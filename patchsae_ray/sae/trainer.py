"""Training steps on batches of residuals: PatchSAE's recipe, one step at a time, in plain torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from patchsae_ray.sae.collective import Alone, Collective
from patchsae_ray.sae.gradients import GRADIENTS, Batch, Pass, dense_pass, empty_pass, sparse_pass
from patchsae_ray.sae.memory import latent_bytes, part_bytes
from patchsae_ray.sae.model import SparseAutoencoder, normalise_decoder
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.ops import SLICE_BYTES
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.window import NUM_TOTALS, TrainingWindow, TrainingWindowResult

Path = Literal["auto", "dense", "sparse"]
"""How gradients are computed; auto goes by the share of active latents in the step before."""

SPARSE_BELOW = {"cpu": {"fp32": 0.15, "bf16": 0.15}, "cuda": {"fp32": 0.014, "bf16": 0.002}}
"""Share of active latents below which the sparse path is taken, by device and the precision of the products.

CPU: measured on two cores of an EPYC 9005, 768 → 49,152 latents, 1,576 tokens, fp32; a sparse step took 0.13 of a dense step's
time at a share of 0.01, 0.18 at 0.03, 0.49 at 0.12, and as long at 0.2. CUDA: not measured, but reckoned from an H100's
rates: an active latent costs four rows of d float32 (5 ns at 2.5 TB/s), and the dense products that it saves 0.07 ns a latent
in fp32 and 0.01 in bf16, so that the two meet at 0.014 and 0.002. `make gpu` measures where they meet.
"""


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw, on all workers, before it moved the weights. Names as in PatchSAE's log."""

    mse_loss: float
    l1_loss: float
    mse_loss_ghost_resid: float
    loss: float
    l0: float
    ghost: int
    """Latents under ghost gradients in this step."""
    flag: int
    """Sum over the workers of what each called `step` with."""


@dataclass
class Trainer:
    """The autoencoder with its optimiser, schedule and dead-latent counters; alike on all workers after every step.

    A step: decoder rows to unit length, forward, backward, the gradient's part along each decoder row removed, Adam,
    then the schedule.
    """

    sae: SparseAutoencoder
    objective: Objective
    schedule: Schedule
    lr: float = 4e-4
    dead_feature_window: int = 64
    """A latent is dead after firing on no token for more than this many batches."""
    accumulate: int = 1
    """Parts, at least, in which a worker computes its share of a step; more where memory wants them."""
    collective: Collective = field(default_factory=Alone)
    path: Path = "auto"
    step_index: int = field(init=False, default=0)
    density: float = field(init=False, default=1.0)
    """Share of active latents in the last step."""
    flops_last_step: float = field(init=False, default=0.0)
    """Of the model: a dense encode, and four products with the active latents."""
    batches_since_fired: Tensor = field(init=False)
    """[s] int64."""
    firing_counts: Tensor = field(init=False)
    """[s] int64: tokens on which each latent fired, since the start."""

    def __post_init__(self) -> None:
        sae = self.sae.requires_grad_(True)
        encoder = nn.Parameter(sae.W_enc.detach().t().contiguous())  # [s, d]: each latent's weights lie together
        sae.W_enc.data = encoder.detach().t()
        self._learned = dict(zip(GRADIENTS, (sae.W_dec, encoder, sae.b_enc, sae.b_dec), strict=True))
        self.batches_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        self.firing_counts = torch.zeros_like(self.batches_since_fired)
        self._window = TrainingWindow(sae.d_in, sae.d_sae, sae.W_enc.device)
        self._num_dead = 0
        self._optimiser = torch.optim.Adam(self._learned.values(), lr=self.lr, fused=True)
        for weight in self._learned.values():
            self._optimiser.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

        device, weight_bytes = sae.W_enc.device, sum(4 * weight.numel() for weight in self._learned.values())
        self._part_bytes = part_bytes(device, weight_bytes, SLICE_BYTES[device.type])

    @property
    def dead(self) -> Tensor:
        """[s] bool: latents that fired on no token for more than `dead_feature_window` batches."""
        return self.batches_since_fired > self.dead_feature_window

    @torch.no_grad()
    def step(self, x: Tensor, cls: Tensor | None = None, num_tokens: int | None = None, flag: int = 0) -> StepMetrics:
        """One step, on this worker's share of its tokens.

        Args:
            x: residuals [m, d] float32; m may be 0.
            cls: [m] bool, the CLS tokens.
            num_tokens: of all workers together; m where it is left out.
            flag: a number to be added up over the workers.

        Raises: FloatingPointError on every worker where the loss is not finite; nothing is then learned from the batch.
        """
        total = len(x) if num_tokens is None else num_tokens
        if total < 1:
            raise ValueError("a step needs a token")
        normalise_decoder(self.sae)
        dead = torch.nonzero(self.dead).flatten() if self.objective.use_ghost_grads and self._num_dead else None
        seen = torch.zeros(3 + len(self._window.values), dtype=torch.float64, device=x.device)
        seen[0] = flag
        gradients = self.collective.sum_gradients(self._gradients(self._parts(x, cls, total, dead), seen))
        self.collective.sum_(seen)
        counts = seen[-self.sae.d_sae :].to(torch.int64)
        batches_since_fired = torch.where(counts > 0, 0, self.batches_since_fired + 1)
        more = torch.stack([seen[-self.sae.d_sae :].sum(), (batches_since_fired > self.dead_feature_window).sum()])
        metrics, num_active, num_dead = self._read(torch.cat([seen[: 3 + NUM_TOTALS], more]).tolist(), total, dead)
        self._adam(gradients)
        self._window.update(seen[3:])
        self.batches_since_fired, self._num_dead = batches_since_fired, num_dead
        self.firing_counts += counts
        self.step_index += 1
        self.density = num_active / (total * self.sae.d_sae)
        self.flops_last_step = self.sae.d_in * (2.0 * total * self.sae.d_sae + 8.0 * num_active)
        return metrics

    def _sparse(self, device: str) -> bool:
        precision = "bf16" if torch.is_autocast_enabled(device) else "fp32"
        return self.path == "sparse" or (self.path == "auto" and self.density < SPARSE_BELOW[device][precision])

    def _parts(self, x: Tensor, cls: Tensor | None, total: int, dead: Tensor | None) -> list[Batch]:
        a_latent = latent_bytes(self.density, self._sparse(x.device.type))
        count = max(self.accumulate, math.ceil(len(x) * self.sae.d_sae * a_latent / self._part_bytes))
        parts = x.chunk(count)
        masks = cls.chunk(count) if cls is not None else [None] * len(parts)
        return [Batch(part, mask, total, dead) for part, mask in zip(parts, masks, strict=True)]

    def _gradients(self, parts: list[Batch], seen: Tensor) -> Iterator[Tensor]:
        """The parts' gradients added up, each as soon as it is whole; what the parts show is added to `seen`."""
        held: list[Tensor] = []
        for batch in parts[:-1]:
            fresh = self._run(batch, seen).gradients
            held = [total.add_(one) for total, one in zip(held, fresh, strict=True)] if held else list(fresh)
        for index, gradient in enumerate(self._run(parts[-1], seen).gradients):
            yield gradient.add_(held[index]) if held else gradient

    def _run(self, batch: Batch, seen: Tensor) -> Pass:
        if not len(batch.x):
            return empty_pass(self.sae)
        run = sparse_pass if self._sparse(batch.x.device.type) else dense_pass
        done = run(self.sae, batch, self.objective)
        seen[1:] += done.sums
        return done

    def _read(self, values: list[float], total: int, dead: Tensor | None) -> tuple[StepMetrics, float, int]:
        """The metrics, the number of active latents, and of latents that are dead from now on."""
        flag, mse, ghost, tokens, *_, l1, num_active, num_dead = values
        if tokens != total:
            raise ValueError(f"num_tokens is {total}, the workers hold {tokens:.0f} tokens")
        sparsity = self.objective.l1_coefficient * l1 / total
        loss = mse + sparsity + ghost
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step_index}")
        under_ghost = 0 if dead is None else len(dead)
        return StepMetrics(mse, sparsity, ghost, loss, num_active / total, under_ghost, int(flag)), num_active, int(num_dead)

    def _adam(self, gradients: list[Tensor]) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self.lr * self.schedule.factor(self.step_index)
        for weight, gradient in zip(self._learned.values(), gradients, strict=True):
            weight.grad = gradient
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    def window_result(self) -> TrainingWindowResult:
        """Metrics over the steps since the last call, of all workers; every worker has the same and starts anew."""
        result = self._window.result(self._num_dead / self.sae.d_sae)
        self._window.clear()
        return result

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs, by name, contiguous; the same on every worker, and to be copied before a step."""
        found = {
            **dict(self._tensors()),
            **{f"window.{name}": value for name, value in self._window.to_tensors().items()},
            "adam.step": torch.tensor(self.step_index),
            "step": torch.tensor(self.step_index),
            "density": torch.tensor(self.density, dtype=torch.float64),
            "batches_since_fired": self.batches_since_fired,
            "firing_counts": self.firing_counts,
        }
        return {name: value.contiguous() for name, value in found.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`, of a run of any number of workers."""
        for name, value in self._tensors():
            value.copy_(state[name])
        for weight in self._learned.values():
            self._optimiser.state[weight]["step"].copy_(state["adam.step"])
        self._window.load_tensors({name: state[f"window.{name}"] for name in self._window.to_tensors()})
        self.step_index, self.density = int(state["step"]), float(state["density"])
        self.batches_since_fired.copy_(state["batches_since_fired"])
        self.firing_counts.copy_(state["firing_counts"])
        self._num_dead = int(self.dead.sum())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights and Adam's means, in the shapes of the autoencoder, as views."""
        for name, weight in self._learned.items():
            moments = {f"adam.{key}.{name}": self._optimiser.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
            for key, value in {name: weight.detach(), **moments}.items():
                yield key, value.t() if name == "W_enc" else value
