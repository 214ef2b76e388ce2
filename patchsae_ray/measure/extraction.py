"""One pass over images gives everything that extraction keeps: a unit's pixels in, its statistics out. No Ray."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.measure.arrays import Arrays, prefixed, without_prefix
from patchsae_ray.measure.image_errors import check_finite
from patchsae_ray.measure.latents import LatentStatistics
from patchsae_ray.measure.quality import ReconstructionQuality
from patchsae_ray.measure.residuals import ResidualBatches
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.names import Tokens
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.ops import reduce_latents, sparse_decode


@dataclass(frozen=True)
class ExtractionSettings:
    """What is measured."""

    tokens: Tokens
    """Tokens whose mean is an image's activation, and that are counted."""
    thresholds: tuple[float, ...]
    """Activations above which a token counts for its image's class."""
    top_k: int
    """Images kept a latent."""
    quality_positions: np.ndarray
    """Sorted positions of the images on which reconstruction is measured."""


class ExtractionTotals:
    """The statistics and quality of any number of units, mergeable in any order."""

    def __init__(self) -> None:
        self.statistics: LatentStatistics | None = None
        self.quality: ReconstructionQuality | None = None

    def add(self, arrays: Arrays) -> None:
        """Take in what a unit, or another's `to_arrays`, gave."""
        statistics = LatentStatistics.from_arrays(without_prefix("latents", arrays))
        quality = ReconstructionQuality.from_arrays(without_prefix("quality", arrays))
        if self.statistics is None or self.quality is None:
            self.statistics, self.quality = statistics, quality
        else:
            self.statistics.merge(statistics)
            self.quality.merge(quality)

    def to_arrays(self) -> Arrays:
        """Everything as arrays.

        Raises: ValueError where nothing was added.
        """
        if self.statistics is None or self.quality is None:
            raise ValueError("nothing was added")
        return {**prefixed("latents", self.statistics.to_arrays()), **prefixed("quality", self.quality.to_arrays())}


class Extractor:
    """The model on its device, turning images into statistics.

    Args:
        backbone: the frozen tower.
        sae: the autoencoder, on the same device.
        settings: what is measured.
        batch_size: images a forward pass.
    """

    def __init__(self, backbone: Backbone, sae: SparseAutoencoder, settings: ExtractionSettings, batch_size: int) -> None:
        self._sae, self._settings = sae, settings
        self._device = sae.W_enc.device.type
        self._tokens = backbone.token_slice(settings.tokens)
        names, types = backbone.token_types(settings.tokens)
        self._types = types.to(self._device)
        self._type_sizes = [int((types == kind).sum()) for kind in range(len(names))]
        self._residuals = ResidualBatches(backbone, batch_size, self._device)

    @torch.inference_mode()
    def unit(
        self, pixels: np.ndarray, positions: np.ndarray, labels: np.ndarray, report: Callable[[int], None] | None = None
    ) -> tuple[Arrays, dict[str, float]]:
        """A unit's statistics and quality sums, as arrays, and the seconds that each stage took.

        Args:
            pixels: [n, h, w, 3] uint8.
            positions: [n] int64.
            labels: [n] int64, -1 without one.
            report: told the number of images done so far, after each batch.

        Raises: ImageError for residuals or latents that are not finite.
        """
        settings = self._settings
        statistics = LatentStatistics(self._sae.d_sae, settings.top_k, self._type_sizes, len(settings.thresholds), self._device)
        quality = ReconstructionQuality(self._sae.d_in)
        sampled = np.isin(positions, settings.quality_positions)
        timer = StageTimer(self._device)
        for rows, residual in self._residuals.of(pixels, timer):
            check_finite(positions[rows], residuals=residual)
            x = residual[:, self._tokens]
            keep = torch.from_numpy(sampled[rows]).to(self._device) if sampled[rows].any() else None
            reduced, active = reduce_latents(self._sae, x, settings.thresholds, self._types, keep)
            check_finite(positions[rows], latents=reduced.means)
            timer.mark("encode")
            statistics.update(reduced, torch.from_numpy(positions[rows]), torch.from_numpy(labels[rows]))
            timer.mark("reduce")
            if active is not None and keep is not None:
                tokens = x[keep].flatten(0, 1).to(torch.float32)
                quality.update(tokens, sparse_decode(self._sae, active), active.value, int(keep.sum()))
                timer.mark("quality")
            if report is not None:
                report(rows.stop)
        arrays = {**prefixed("latents", statistics.to_arrays()), **prefixed("quality", quality.to_arrays())}
        timer.mark("reduce")
        return arrays, timer.seconds
