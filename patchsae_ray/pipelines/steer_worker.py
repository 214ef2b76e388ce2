"""What the actors of a steering run do: units in, right predictions by ranking and setting out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from patchsae_ray.backbone.adapter import Adapter
from patchsae_ray.backbone.clip import build_clip
from patchsae_ray.backbone.config import BackboneConfig
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.rankings import Ranker
from patchsae_ray.measure.steering import Steerer, SteeringSettings
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.pipelines.planning import Plan


def classifier_rows(
    config: BackboneConfig, weights: dict[str, np.ndarray], adapter: Adapter, classnames: tuple[str, ...], plan: Plan
) -> np.ndarray:
    """Zero-shot classifier [c, e] float32 of plain or adapted CLIP; run as a Ray task where the plan's device is."""
    torch.set_num_threads(plan.threads)
    clip = build_clip(config, {name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    return adapter.classifier(clip.to(plan.device), config, classnames).cpu().numpy()


@dataclass(frozen=True)
class SteerTask:
    """What the actors of a steering run do."""

    model: PortableModel
    classifier: np.ndarray
    """[c, e] float32."""
    logit_scale: float
    counts: np.ndarray | None
    """[s, c], where a ranking needs them."""
    cross: np.ndarray | None
    """[s, c] of another model, for the ranking cross."""
    settings: SteeringSettings
    seed: int
    batch_size: int

    def start(self, device: str) -> "SteerWorker":
        return SteerWorker(self, device)


class SteerWorker:
    """The model on its device, turning units into right predictions."""

    def __init__(self, task: SteerTask, device: str) -> None:
        backbone, sae = task.model.build_backbone(device), task.model.build_sae(device)
        classifier = torch.from_numpy(np.array(task.classifier)).to(device)
        ranker = Ranker(task.counts, sae.d_sae, task.seed, device, task.cross)
        self._steerer = Steerer(backbone, sae, classifier, task.logit_scale, ranker, task.settings, task.batch_size)

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """A unit's right predictions by ranking, as arrays, and stage times."""
        return self._steerer.unit(unit.pixels, unit.positions, unit.labels, report)
