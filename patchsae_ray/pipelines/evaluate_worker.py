"""What the actors of an evaluation do: units in, sums out; and which images they take."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from patchsae_ray.data.manifest import Manifest, Segment, Unit, UnitTable, cut_units
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.evaluator import Evaluator, ResidualSummer, ZeroShotHead
from patchsae_ray.names import Tokens
from patchsae_ray.pipelines.model import PortableModel


@dataclass(frozen=True)
class Chosen:
    """Which images of a pass are measured, and where they are in the data set."""

    positions: np.ndarray | None
    """[images of the pass] int64: position in the data set; None where the pass is over the whole of it."""
    sample: np.ndarray | None
    """Sorted positions in the data set of the images that are measured; None for all."""

    def place(self, position: int) -> int:
        """An image's position in the data set, from that in the pass."""
        return position if self.positions is None else int(self.positions[position])

    def of(self, unit: DecodedUnit) -> DecodedUnit:
        """The measured images of a unit, under their positions in the data set; the others never reach the tower."""
        positions = unit.positions if self.positions is None else self.positions[unit.positions]
        if self.sample is None:
            return replace(unit, positions=positions)
        inside = np.isin(positions, self.sample)
        if inside.all():
            return replace(unit, positions=positions)
        return replace(unit, pixels=unit.pixels[inside], positions=positions[inside], labels=unit.labels[inside])


def narrowed(manifest: Manifest, sample: np.ndarray) -> tuple[Manifest, Chosen]:
    """The images that must be read for a sample, as a manifest with positions of its own, and what becomes of them.

    Of a folder these are the sample itself; of Parquet files and tars, which are read in runs, every unit that holds any.

    Args:
        manifest: of the data set.
        sample: sorted positions.
    """
    if len(sample) == manifest.num_images:
        return manifest, Chosen(None, None)
    holders = np.searchsorted(manifest.units.edges(), sample, side="right") - 1
    kept = [manifest.units[index] for index in np.unique(holders).tolist()]
    if manifest.reading.format == "folder":
        picked = [piece for unit in kept for piece in _picked(unit, sample)]
        cut = cut_units(picked)
        units = [replace(unit, segments=tuple(replace(piece, first=0) for piece in unit.segments)) for unit in cut]
        positions = sample
    else:
        starts = np.cumsum([0, *(unit.count for unit in kept)]).tolist()
        units = [replace(unit, index=index, start=starts[index]) for index, unit in enumerate(kept)]
        positions = np.concatenate([np.arange(unit.start, unit.start + unit.count) for unit in kept])
    return replace(manifest, units=UnitTable.of(units), keeping=None), Chosen(positions, sample)


def _picked(unit: Unit, sample: np.ndarray) -> list[Segment]:
    """A folder unit's segments with the sampled files alone."""
    found, start = [], unit.start
    for segment in unit.segments:
        low, high = np.searchsorted(sample, [start, start + segment.count])
        rows = (sample[low:high] - start).tolist()
        names, labels = tuple(segment.names[row] for row in rows), tuple(segment.labels[row] for row in rows)
        found.append(replace(segment, count=len(rows), names=names, labels=labels))
        start += segment.count
    return found


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
