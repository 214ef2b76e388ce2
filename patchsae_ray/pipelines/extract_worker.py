"""What the actors of a pass over latents do: units in, statistics out."""

from collections.abc import Callable
from dataclasses import dataclass

from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.extraction import ExtractionSettings, Extractor
from patchsae_ray.pipelines.model import PortableModel


@dataclass(frozen=True)
class ExtractTask:
    """What the actors of a pass over latents do."""

    model: PortableModel
    measured: ExtractionSettings
    batch_size: int

    def start(self, device: str) -> "ExtractWorker":
        return ExtractWorker(self, device)


class ExtractWorker:
    """The model on its device, turning units into statistics."""

    def __init__(self, task: ExtractTask, device: str) -> None:
        backbone, sae = task.model.build_backbone(device), task.model.build_sae(device)
        self._extractor = Extractor(backbone, sae, task.measured, task.batch_size)

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """A unit's statistics and quality sums, as arrays, and stage times."""
        return self._extractor.unit(unit.pixels, unit.positions, unit.labels, report)
