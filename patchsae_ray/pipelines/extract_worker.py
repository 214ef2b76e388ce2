"""What the actors of a pass over latents do: units in, statistics out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays, prefixed
from patchsae_ray.measure.latents import LatentStatistics
from patchsae_ray.measure.quality import ReconstructionQuality
from patchsae_ray.names import Tokens
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.pipelines.units import StageTimer
from patchsae_ray.sae.ops import active_latents, reduce_latents, sparse_decode


@dataclass(frozen=True)
class ExtractTask:
    """What the actors of a pass over latents do."""

    model: PortableModel
    tokens: Tokens
    threshold: float
    batch_size: int
    top_k: int
    quality_positions: np.ndarray
    """Sorted positions of the images on which reconstruction is measured."""

    def start(self, device: str) -> "ExtractWorker":
        return ExtractWorker(self, device)


class ExtractWorker:
    """The model on its device, turning units into statistics."""

    def __init__(self, task: ExtractTask, device: str) -> None:
        self._task, self._device = task, device
        self._backbone = task.model.build_backbone(device)
        self._sae = task.model.build_sae(device)
        self._tokens = self._backbone.token_slice(task.tokens)

    @torch.inference_mode()
    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> Arrays:
        """A unit's statistics and quality sums, as arrays."""
        statistics = LatentStatistics(self._sae.d_sae, self._task.top_k, self._device)
        quality = ReconstructionQuality(self._sae.d_in)
        timer = StageTimer(self._device)
        for start in range(0, len(unit.positions), self._task.batch_size):
            rows = slice(start, start + self._task.batch_size)
            pixels = torch.from_numpy(np.array(unit.pixels[rows])).to(self._device)
            timer.mark("copy")
            x = self._backbone.to_hook(pixels)[:, self._tokens]
            timer.mark("to_hook")
            reduced = reduce_latents(self._sae, x, self._task.threshold)
            timer.mark("encode")
            positions = torch.from_numpy(np.array(unit.positions[rows]))
            statistics.update(reduced, positions, torch.from_numpy(np.array(unit.labels[rows])))
            timer.mark("reduce")
            self._measure(quality, x, unit.positions[rows])
            timer.mark("quality")
            report(min(rows.stop, len(unit.positions)))
        unit.seconds.update(timer.seconds)
        return {**prefixed("latents", statistics.to_arrays()), **prefixed("quality", quality.to_arrays())}

    def _measure(self, quality: ReconstructionQuality, x: torch.Tensor, positions: np.ndarray) -> None:
        chosen = np.flatnonzero(np.isin(positions, self._task.quality_positions))
        if len(chosen):
            sample = x[torch.from_numpy(chosen).to(x.device)]
            active = active_latents(self._sae, sample)
            tokens = sample.flatten(0, 1).to(torch.float32)
            quality.update(tokens, sparse_decode(self._sae, active), active.value, len(chosen))
