"""The model on its device, turning images into the sums of measure/evaluation.py. No Ray.

Shapes: n images, t tokens of the tower, d width, k types of tokens, m conditions, c classes, e embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.backbone.zero_shot import logits
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.evaluation import EvaluationTotals, TokenMetrics, sums_by_type
from patchsae_ray.measure.image_errors import check_finite, check_labels
from patchsae_ray.measure.recovered import ZeroShotMetrics, conditions_of
from patchsae_ray.measure.residuals import ResidualBatches
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.measure.sums import CompensatedSum
from patchsae_ray.names import Tokens
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.ops import active_latents, sparse_decode

ACTIVE_BYTES = {"cpu": 2**29, "cuda": 2**32}
"""Of the active latents of the images encoded at once, were every latent active: so that a dense autoencoder fits too."""
_BYTES_A_LATENT = 20
"""Of an entry of `ActiveLatents`: token, latent, value."""


@dataclass(frozen=True)
class ZeroShotHead:
    """What images are classified with, on the device."""

    classifier: Tensor
    """[c, e]."""
    logit_scale: float
    """CLIP's, as the logarithm that it is kept as."""
    means: Tensor
    """[k, d] float32: what mean ablation puts in place of the tokens of each type."""


class MeanTotals:
    """Sums of the residuals by type of token, over any number of units, mergeable in any order."""

    def __init__(self) -> None:
        self.sums: CompensatedSum | None = None
        """[k, d]."""
        self.tokens = np.zeros(0, dtype=np.int64)
        """[k]."""

    def add(self, arrays: Arrays) -> None:
        """Take in what a unit, or another's `to_arrays`, gave."""
        found = CompensatedSum.from_stacked(arrays["sums"])
        if self.sums is None:
            self.sums, self.tokens = found, arrays["tokens"]
        else:
            self.sums.merge(found)
            self.tokens = self.tokens + arrays["tokens"]

    def to_arrays(self) -> Arrays:
        """Everything as arrays.

        Raises: ValueError where nothing was added.
        """
        if self.sums is None:
            raise ValueError("nothing was added")
        return {"sums": self.sums.stacked(), "tokens": self.tokens}

    def means(self) -> np.ndarray | None:
        """[k, d] float64, or None where there are no tokens."""
        return None if self.sums is None or not self.tokens.all() else self.sums.high / self.tokens[:, None]


class ResidualSummer:
    """The tower up to the hook, turning images into `MeanTotals`.

    Args:
        backbone: the frozen tower, on its device.
        tokens: which tokens.
        batch_size: images a forward pass.
        device: cpu or cuda.
    """

    def __init__(self, backbone: Backbone, tokens: Tokens, batch_size: int, device: str) -> None:
        self._device, self._tokens = device, backbone.token_slice(tokens)
        self._names, types = backbone.token_types(tokens)
        self._types = types.to(device)
        self._residuals = ResidualBatches(backbone, batch_size, device)
        self._width = backbone.width

    @torch.inference_mode()
    def unit(
        self, pixels: np.ndarray, positions: np.ndarray, report: Callable[[int], None] | None = None
    ) -> tuple[Arrays, dict[str, float]]:
        """The sums of a unit's images, and the seconds that each stage took; arguments as of `Evaluator.unit`.

        Raises: ImageError for residuals that are not finite.
        """
        sums, timer = CompensatedSum((len(self._names), self._width)), StageTimer(self._device)
        for rows, residual in self._residuals.of(pixels, timer):
            check_finite(positions[rows], residuals=residual)
            sums.add(sums_by_type(residual[:, self._tokens].to(torch.float64), self._types, len(self._names)))
            timer.mark("reduce")
            if report is not None:
                report(rows.stop)
        tokens = len(pixels) * torch.bincount(self._types, minlength=len(self._names)).cpu().numpy()
        return {"sums": sums.stacked(), "tokens": tokens}, timer.seconds


class Evaluator:
    """Tower, autoencoder and, where images are classified, the zero-shot head.

    Args:
        backbone: the frozen tower.
        sae: the autoencoder, on the same device.
        tokens: which tokens are measured, and replaced.
        batch_size: images a forward pass.
        head: None where nothing is classified.
    """

    def __init__(
        self, backbone: Backbone, sae: SparseAutoencoder, tokens: Tokens, batch_size: int, head: ZeroShotHead | None = None
    ) -> None:
        self._backbone, self._sae, self._head = backbone, sae, head
        self._device = sae.W_enc.device.type
        self._tokens = backbone.token_slice(tokens)
        self._names, types = backbone.token_types(tokens)
        self._types = types.to(self._device)
        self._conditions = conditions_of(self._names)
        self._residuals = ResidualBatches(backbone, batch_size, self._device)
        image_bytes = _BYTES_A_LATENT * len(types) * sae.d_sae
        self._images_at_once = max(1, ACTIVE_BYTES[self._device] // image_bytes)

    @torch.inference_mode()
    def unit(
        self, pixels: np.ndarray, positions: np.ndarray, labels: np.ndarray, report: Callable[[int], None] | None = None
    ) -> tuple[Arrays, dict[str, float]]:
        """A unit's sums, as `EvaluationTotals` arrays, and the seconds that each stage took.

        Args:
            pixels: [n, h, w, 3] uint8.
            positions: [n] int64, of the images in the data set.
            labels: [n] int64, -1 without one; such an image is not classified.
            report: told the number of images done so far.

        Raises: ImageError for residuals, reconstructions or scores that are not finite, and where a label has no class.
        """
        totals, timer = EvaluationTotals(), StageTimer(self._device)
        tokens = totals.tokens = TokenMetrics(len(self._names), self._sae.d_in, self._sae.d_sae)
        if self._head is not None:
            num_classes = len(self._head.classifier)
            check_labels(positions, labels, num_classes)
            totals.zero_shot = ZeroShotMetrics(len(self._conditions), num_classes)
        for rows, whole in self._residuals.of(pixels, timer):
            check_finite(positions[rows], residuals=whole)
            for start in range(rows.start, rows.stop, self._images_at_once):
                part = slice(start, min(start + self._images_at_once, rows.stop))
                residual = whole[part.start - rows.start : part.stop - rows.start].to(torch.float32)
                reconstruction = self._measure(residual, positions[part], tokens, timer)
                if totals.zero_shot is not None:
                    self._classify(residual, reconstruction, positions[part], labels[part], totals.zero_shot)
                    timer.mark("from_hook")
                if report is not None:
                    report(part.stop)
        arrays = totals.to_arrays()
        timer.mark("reduce")
        return arrays, timer.seconds

    def _measure(self, residual: Tensor, positions: np.ndarray, tokens: TokenMetrics, timer: StageTimer) -> Tensor:
        """Take in residuals; returns the measured tokens' reconstruction."""
        x = residual[:, self._tokens]
        active = active_latents(self._sae, x)
        timer.mark("encode")
        reconstruction = sparse_decode(self._sae, active).view(x.shape)
        check_finite(positions, reconstructions=reconstruction)
        timer.mark("decode_latents")
        tokens.update(x, reconstruction, active, self._types)
        timer.mark("reduce")
        return reconstruction

    def _classify(
        self, residual: Tensor, reconstruction: Tensor, positions: np.ndarray, labels: np.ndarray, into: ZeroShotMetrics
    ) -> None:
        """Take in the labelled ones of some images under every condition."""
        head, labelled = self._head, np.flatnonzero(labels >= 0)
        if head is None or not len(labelled):
            return
        where = torch.from_numpy(labelled).to(self._device)
        residual, reconstruction = residual[where], reconstruction[where]
        means = head.means[self._types].expand(reconstruction.shape)
        values = {"reconstruction": reconstruction, "zero_ablation": torch.zeros_like(means), "mean_ablation": means}
        variants = residual.repeat(len(self._conditions), 1, 1, 1)  # [m, n, t, d]
        for variant, condition in zip(variants, self._conditions, strict=True):
            if condition.what != "no_sae":
                replaced = variant[:, self._tokens]
                chosen = slice(None) if condition.tokens == "all" else self._types == self._names.index(condition.tokens)
                replaced[:, chosen] = values[condition.what][:, chosen]
        scores = logits(self._backbone.from_hook(variants.flatten(0, 1)), head.classifier, head.logit_scale)
        scores = scores.view(len(variants), len(where), -1)
        check_finite(positions[labelled], scores=scores.transpose(0, 1))
        into.update(scores, torch.from_numpy(labels[labelled]).to(self._device))
