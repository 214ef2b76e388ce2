"""What the trainer does, as a Ray task: images stream in from Ray Data, messages stream out to the driver."""

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.shuffle import batches
from patchsae_ray.errors import UserError
from patchsae_ray.measure.stages import StageTimer, peak_bytes
from patchsae_ray.pipelines.bundles import BadRows
from patchsae_ray.pipelines.cluster import Plan
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.pipelines.units import decoded_units
from patchsae_ray.sae.model import SparseAutoencoder, geometric_median, initialise
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Trainer
from patchsae_ray.settings import TrainSettings

B_DEC_TOKENS = 65_536
"""Tokens, at most, whose centre b_dec starts at."""
REPORT_STEPS = 10
"""Steps between the metrics that the driver gets."""


@dataclass(frozen=True)
class TrainTask:
    """What the trainer gets."""

    model: PortableModel
    settings: TrainSettings
    total_images: int
    order: tuple[int, ...]
    """Units in the order of training, epochs laid end to end."""

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_images / self.settings.batch_size)


def checkpoint_steps(n_checkpoints: int, total_steps: int) -> list[int]:
    """After which steps an extra checkpoint is taken: evenly spaced, never the last."""
    steps = {round(total_steps * (index + 1) / (n_checkpoints + 1)) for index in range(n_checkpoints)}
    return sorted(step for step in steps if 0 < step < total_steps)


@dataclass(frozen=True)
class Message:
    """From the trainer to the driver."""

    images: int
    step: int
    metrics: dict[str, float]
    weights: dict[str, np.ndarray] | None = None
    """An autoencoder's tensors, at a checkpoint and at the end."""
    bad: BadRows = field(default_factory=list)
    """Unreadable images since the last message."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage times, with the last message."""
    peak_bytes: int = 0
    """Peak resident memory of the trainer, with the last message."""
    last: bool = False


def train_units(task: TrainTask, manifest: Manifest, image_size: int, plan: Plan) -> Iterator[Message]:
    """The trainer's loop, run as a Ray task; yields messages."""
    torch.set_num_threads(plan.threads)
    settings, device = task.settings, plan.device
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    source = DecodedBlocks(manifest, task.order, image_size, plan)
    backbone = task.model.build_backbone(device)
    tokens = backbone.token_slice(settings.tokens)
    trainer: Trainer | None = None
    images, last, timer = 0, {}, StageTimer(device)
    saves = checkpoint_steps(settings.n_checkpoints, task.total_steps)
    for pixels in batches(source, settings.batch_size, task.total_images, settings.seed):
        timer.mark("data")
        x = residuals(backbone, pixels, tokens, device)
        timer.mark("to_hook")
        trainer = trainer or make_trainer(settings, x, task.total_steps)
        with autocast(device, task.model.precision):
            step = trainer.step(x)
        images += len(pixels)
        last = {**asdict(step), "dead_share": float(trainer.dead.float().mean())}
        timer.mark("step")
        save = trainer.step_index in saves
        if save or trainer.step_index % REPORT_STEPS == 0:
            yield Message(images, trainer.step_index, last, _weights(trainer.sae) if save else None, source.take_bad())
    if trainer is None or images < task.total_images:
        raise UserError(f"too few readable images: training ended after {images:,} of {task.total_images:,}")
    seconds = timer.seconds
    yield Message(images, trainer.step_index, last, _weights(trainer.sae), source.take_bad(), seconds, peak_bytes(), last=True)


class DecodedBlocks:
    """Blocks of pixels in training order, streamed by Ray Data; bad rows are kept aside.

    Args:
        manifest: the images.
        order: unit indices; a unit may come again in a later epoch.
        image_size: side of the pixels.
        plan: what decoding gets.
    """

    def __init__(self, manifest: Manifest, order: tuple[int, ...], image_size: int, plan: Plan) -> None:
        self._rows = decoded_units(manifest, order, image_size, plan)
        self._seen: set[int] = set()
        self._bad: BadRows = []

    def __iter__(self) -> Iterator[np.ndarray]:
        for row in self._rows.iter_rows():
            for position, path, reason in json.loads(row["header"])["bad"]:
                if position not in self._seen:
                    self._seen.add(position)
                    self._bad.append((position, path, reason))
            yield row["pixels"]

    def take_bad(self) -> BadRows:
        """Bad rows since the last call, each position once."""
        taken, self._bad = self._bad, []
        return taken


def residuals(backbone: Backbone, pixels: np.ndarray, tokens: slice, device: str) -> Tensor:
    """Pixels of a batch → residuals [n, t, d] in float32 at the hook."""
    x = backbone.to_hook(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))[:, tokens]
    return x.to(torch.float32).clone()


def make_trainer(settings: TrainSettings, x: Tensor, total_steps: int) -> Trainer:
    """A fresh autoencoder by the settings, b_dec at a centre of the first batch's tokens x [n, t, d]."""
    width = x.shape[-1]
    sae = SparseAutoencoder(width, width * settings.expansion_factor)
    generator = torch.Generator().manual_seed(settings.seed)
    initialise(sae, generator)
    tokens = x.flatten(0, 1).cpu()
    tokens = tokens[torch.randperm(len(tokens), generator=generator)[:B_DEC_TOKENS]]
    with torch.no_grad():
        if settings.b_dec_init_method == "geometric_median":
            sae.b_dec.copy_(geometric_median(tokens))
        elif settings.b_dec_init_method == "mean":
            sae.b_dec.copy_(tokens.mean(dim=0))
    objective = Objective(settings.l1_coefficient, settings.mse_cls_coefficient, settings.use_ghost_grads)
    schedule = Schedule(settings.lr_scheduler_name, total_steps, settings.lr_warm_up_steps)
    has_cls = settings.tokens != "patch"
    return Trainer(sae.to(x.device), objective, schedule, settings.lr, settings.dead_feature_window, has_cls)


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """bf16 products around float32 weights, or nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _weights(sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy().copy() for name, value in sae.state_dict().items()}
