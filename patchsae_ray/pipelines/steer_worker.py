"""What the actors of a steering run do: one tower, one encode and one sparse decode an image give every k.

Decoding is linear, so the running sum over the ranking is the reconstruction at each k, and only the CLS row of the tail's
last block is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.backbone.clip import build_clip
from patchsae_ray.backbone.config import BackboneConfig
from patchsae_ray.backbone.zero_shot import logits, text_embeddings
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays, prefixed, without_prefix
from patchsae_ray.measure.masking import MaskingAccuracy
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.pipelines.cluster import Plan
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.sae.ops import active_latents, masked_reconstructions


def classifier_rows(
    config: BackboneConfig, weights: dict[str, np.ndarray], classnames: tuple[str, ...], plan: Plan
) -> np.ndarray:
    """Zero-shot classifier [c, e] float32 from OpenAI's 80 templates; run as a Ray task where the plan's device is."""
    torch.set_num_threads(plan.threads)
    clip = build_clip(config, {name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    return text_embeddings(clip.to(plan.device), config, classnames).cpu().numpy()


@dataclass(frozen=True)
class SteerTask:
    """What the actors of a steering run do."""

    model: PortableModel
    classifier: np.ndarray
    """[c, e] float32."""
    counts: np.ndarray
    """[s, c]."""
    ks: tuple[int, ...]
    rankings: tuple[str, ...]
    output_offset: float
    seed: int
    batch_size: int

    def start(self, device: str) -> "SteerWorker":
        return SteerWorker(self, device)


class SteerTotals:
    """Right predictions by ranking, of any number of units."""

    def __init__(self) -> None:
        self.accuracy: dict[str, MaskingAccuracy] = {}

    def add(self, arrays: Arrays) -> None:
        """Take in what a unit, or another's `to_arrays`, gave."""
        for ranking in sorted({name.split("/")[0] for name in arrays}):
            found = MaskingAccuracy.from_arrays(without_prefix(ranking, arrays))
            if ranking in self.accuracy:
                self.accuracy[ranking].merge(found)
            else:
                self.accuracy[ranking] = found

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        arrays: Arrays = {}
        for ranking, counts in self.accuracy.items():
            arrays.update(prefixed(ranking, counts.to_arrays()))
        return arrays


class SteerWorker:
    """The model on its device, turning units into counts of right predictions."""

    def __init__(self, task: SteerTask, device: str) -> None:
        self._task, self._device = task, device
        self._backbone = task.model.build_backbone(device)
        self._sae = task.model.build_sae(device)
        self._classifier = torch.from_numpy(np.array(task.classifier)).to(device)
        self._ks = torch.tensor(task.ks, device=device)
        self._ranks = lru_cache(maxsize=64)(self._make_ranks)

    def _make_ranks(self, ranking: str, label: int) -> Tensor:
        """[s] int64: place of each latent. Equal counts: the lower latent first."""
        if ranking == "random":
            order = np.random.default_rng(self._task.seed).permutation(self._sae.d_sae)
        else:
            order = np.argsort(-self._task.counts[:, label].astype(np.float64), kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        return torch.from_numpy(ranks).to(self._device)

    @torch.inference_mode()
    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """A unit's right predictions for every ranking and setting, and stage times."""
        num_settings, num_classes = 1 + 2 * len(self._ks), len(self._classifier)
        accuracy = {ranking: MaskingAccuracy(num_settings, num_classes) for ranking in self._task.rankings}
        timer = StageTimer(self._device)
        for start in range(0, len(unit.positions), self._task.batch_size):
            rows = slice(start, start + self._task.batch_size)
            pixels = torch.from_numpy(np.array(unit.pixels[rows])).to(self._device)
            timer.mark("copy")
            residual = self._backbone.to_hook(pixels)
            unmasked = self._predict(residual)
            timer.mark("to_hook")
            for index, label in enumerate(unit.labels[rows].tolist()):
                if label >= 0:
                    self._steer_image(residual[index], int(unmasked[index]), label, accuracy, timer)
                report(start + index + 1)
        totals = SteerTotals()
        totals.accuracy = accuracy
        return totals.to_arrays(), timer.seconds

    def _steer_image(
        self, residual: Tensor, unmasked: int, label: int, accuracy: dict[str, MaskingAccuracy], timer: StageTimer
    ) -> None:
        active = active_latents(self._sae, residual[None])
        timer.mark("encode")
        for ranking, counts in accuracy.items():
            ranks = self._ranks(ranking, -1 if ranking == "random" else label)
            on, off = masked_reconstructions(self._sae, active, ranks, self._ks)
            variants = torch.stack([on, off], dim=1).flatten(0, 1) + self._task.output_offset
            timer.mark("decode_latents")
            predicted = self._predict(variants).cpu().numpy()
            counts.update(np.concatenate([[unmasked], predicted]), label)
            timer.mark("from_hook")

    def _predict(self, residual: Tensor) -> Tensor:
        """[n] predicted classes of residuals [n, t, d], some at a time so that memory stays bounded."""
        found = [
            logits(self._backbone.from_hook(part), self._classifier, 0.0).argmax(dim=-1)
            for part in residual.split(max(1, self._task.batch_size))
        ]
        return torch.cat(found)
