"""What the actors of an evaluation do: units in, sums out; and which images they take."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from patchsae_ray.data.manifest import Manifest, even_edges
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.evaluator import Evaluator, ResidualSummer, ZeroShotHead
from patchsae_ray.names import Tokens
from patchsae_ray.pipelines.model import PortableModel


@dataclass(frozen=True)
class Chosen:
    """Which images of a data set a pass is over."""

    positions: np.ndarray | None
    """[images of the pass] int64: position in the data set; None where the pass is over the whole of it."""

    def place(self, position: int) -> int:
        """An image's position in the data set, from that in the pass."""
        return position if self.positions is None else int(self.positions[position])

    def of(self, unit: DecodedUnit) -> DecodedUnit:
        """A unit's images under their positions in the data set."""
        return unit if self.positions is None else replace(unit, positions=self.positions[unit.positions])


def narrowed(manifest: Manifest, sample: np.ndarray) -> tuple[Manifest, Chosen]:
    """A sample as a manifest with positions of its own, and what these are in the data set; no other image is decoded.

    Of Parquet that is read in row groups, each unit keeps its sampled images, so that no group is read for two units.

    Args:
        manifest: of the data set.
        sample: sorted positions.
    """
    if len(sample) == manifest.num_images:
        return manifest, Chosen(None)
    edges = even_edges(len(sample))
    if manifest.grain == "group":
        edges = np.unique(np.searchsorted(sample, manifest.units.edges()))
    return replace(manifest, units=manifest.units.picked(sample, edges), keeping=None), Chosen(sample)


@dataclass(frozen=True)
class MeansTask:
    """What the actors of the first pass do: sums of the residuals, for mean ablation."""

    model: PortableModel
    chosen: Chosen
    tokens: Tokens
    batch_size: int

    def start(self, device: str) -> "MeansWorker":
        return MeansWorker(self, device)


class MeansWorker:
    """The tower up to the hook on its device, turning units into sums of residuals."""

    def __init__(self, task: MeansTask, device: str) -> None:
        self._chosen = task.chosen
        self._summer = ResidualSummer(task.model.build_backbone(device), task.tokens, task.batch_size, device)

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """The sums of a unit's measured images, as arrays, and stage times."""
        measured = self._chosen.of(unit)
        return self._summer.unit(measured.pixels, measured.positions, report)


@dataclass(frozen=True)
class HeadArrays:
    """`ZeroShotHead` as plain arrays."""

    classifier: np.ndarray
    """[c, e] float32."""
    logit_scale: float
    means: np.ndarray
    """[k, d] float64."""

    def on(self, device: str) -> ZeroShotHead:
        classifier, means = (torch.tensor(array, dtype=torch.float32, device=device) for array in (self.classifier, self.means))
        return ZeroShotHead(classifier, self.logit_scale, means)


@dataclass(frozen=True)
class EvaluateTask:
    """What the actors of the second pass do: everything else."""

    model: PortableModel
    chosen: Chosen
    tokens: Tokens
    batch_size: int
    head: HeadArrays | None
    """None where nothing is classified."""

    def start(self, device: str) -> "EvaluateWorker":
        return EvaluateWorker(self, device)


class EvaluateWorker:
    """The model on its device, turning units into sums."""

    def __init__(self, task: EvaluateTask, device: str) -> None:
        self._chosen = task.chosen
        backbone, sae = task.model.build_backbone(device), task.model.build_sae(device)
        head = None if task.head is None else task.head.on(device)
        self._evaluator = Evaluator(backbone, sae, task.tokens, task.batch_size, head)

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """The sums of a unit's measured images, as arrays, and stage times."""
        measured = self._chosen.of(unit)
        return self._evaluator.unit(measured.pixels, measured.positions, measured.labels, report)
