"""Zero-shot predictions with latents masked: one tower, one encode, and a sparse decode a ranking give every k. No Ray.

Decoding is linear, so a running sum over a ranking is the reconstruction at each k; and of the tail's last block only the
CLS row is computed. Shapes: n images, t tokens, d width, s latents, c classes, k numbers of latents, m = 2 k settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.backbone.zero_shot import logits
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.image_errors import check_finite, check_labels
from patchsae_ray.measure.masking import MaskingAccuracy, halves_of
from patchsae_ray.measure.outcomes import Outcomes
from patchsae_ray.measure.rankings import Ranker, Ranking
from patchsae_ray.measure.residuals import ResidualBatches
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.measure.steering_totals import Predictions, SteeringTotals
from patchsae_ray.names import ErrorTerm, Tokens
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.ops import ActiveLatents, active_latents, masked_reconstructions, sparse_decode

KS_AT_ONCE = 32
"""Numbers of latents whose variants of an image are there at once; a longer list is gone through in parts."""
VARIANT_BYTES = {"cpu": 2**24, "cuda": 2**31}
"""About as much of an image's masked residuals at once: near a CPU's cache, and few waits on a GPU."""


@dataclass(frozen=True)
class SteeringSettings:
    """What is masked, how, and what is put back."""

    ks: tuple[int, ...]
    """Numbers of latents kept and removed, ascending."""
    rankings: tuple[Ranking, ...]
    """Orders of the latents."""
    intervene: Tokens
    """Tokens whose residual is replaced; the others keep theirs."""
    error_term: ErrorTerm
    """add: what the whole reconstruction lacks of the residual is added back."""
    output_offset: float
    """Added to every element that is replaced."""
    predictions: bool
    """Whether each image's predictions are kept."""


class Steerer:
    """The model on its device, turning images into predictions with latents masked.

    Args:
        backbone: the frozen tower.
        sae: the autoencoder, on the same device.
        classifier: [c, e] zero-shot classifier, on the same device.
        logit_scale: CLIP's, as the logarithm that it is kept as.
        ranker: places of the latents, on the same device.
        settings: what is masked.
        batch_size: images a forward pass.
    """

    def __init__(
        self, backbone: Backbone, sae: SparseAutoencoder, classifier: Tensor, logit_scale: float, ranker: Ranker,
        settings: SteeringSettings, batch_size: int,
    ) -> None:  # fmt: skip
        self._backbone, self._sae, self._ranker, self._settings = backbone, sae, ranker, settings
        self._classifier, self._logit_scale = classifier, logit_scale
        self._device = sae.W_enc.device.type
        self._residuals = ResidualBatches(backbone, batch_size, self._device)
        self._ks = torch.tensor(settings.ks, device=self._device)
        self._whole = settings.ks[-1] == sae.d_sae
        self._other_half = torch.zeros(2, len(classifier), device=self._device)
        self._half_of = torch.zeros(len(classifier), dtype=torch.int64, device=self._device)
        for index, part in enumerate(halves_of(len(classifier)).values()):
            self._other_half[1 - index, part] = -torch.inf
            self._half_of[part] = index
        self._replaced = backbone.token_slice(settings.intervene)
        ranked_by_image = any(ranking.name == "image" for ranking in settings.rankings)
        self._encoded = slice(0, backbone.num_tokens) if ranked_by_image else self._replaced
        variant_bytes = 4 * 2 * min(len(settings.ks), KS_AT_ONCE) * backbone.num_tokens * backbone.width
        self._images_at_once = max(1, VARIANT_BYTES[self._device] // variant_bytes)

    @torch.inference_mode()
    def unit(
        self, pixels: np.ndarray, positions: np.ndarray, labels: np.ndarray, report: Callable[[int], None] | None = None
    ) -> tuple[Arrays, dict[str, float]]:
        """What a unit's labelled images give, as `SteeringTotals` arrays, and the seconds that each stage took.

        Args:
            pixels: [n, h, w, 3] uint8.
            positions: [n] int64.
            labels: [n] int64, -1 without one.
            report: told the number of images done so far.

        Raises: ImageError for residuals or scores that are not finite, and where a label has no class.
        """
        totals = SteeringTotals()
        num_masked, num_classes = 2 * len(self._ks), len(self._classifier)
        check_labels(positions, labels, num_classes)
        for ranking in self._settings.rankings:
            totals.accuracy[ranking.name] = MaskingAccuracy(num_masked, num_classes, ranking.orders)
            totals.in_half[ranking.name] = MaskingAccuracy(num_masked, num_classes, ranking.orders)
        timer = StageTimer(self._device)
        right = [np.zeros((0, 2 * (1 + self._whole)), dtype=bool)]
        for rows, residual in self._residuals.of(pixels, timer):
            labelled = np.flatnonzero(labels[rows] >= 0)
            for start in range(0, len(labelled), self._images_at_once):
                chosen = labelled[start : start + self._images_at_once]
                where = torch.from_numpy(chosen).to(self._device)
                right.append(self._steer(residual[where], positions[rows][chosen], labels[rows][chosen], totals, timer))
                if report is not None:
                    report(rows.start + int(chosen[-1]) + 1)
            if report is not None:
                report(rows.stop)
        totals.outcomes = Outcomes(right[0].shape[1])
        totals.outcomes.update(positions[labels >= 0], labels[labels >= 0], np.concatenate(right))
        arrays = totals.to_arrays()
        timer.mark("reduce")
        return arrays, timer.seconds

    def _steer(
        self, residual: Tensor, positions: np.ndarray, labels: np.ndarray, totals: SteeringTotals, timer: StageTimer
    ) -> np.ndarray:
        """Take in images, all labelled. Returns what `tried` names, of each: [n, w] bool."""
        true = torch.from_numpy(labels).to(self._device)[:, None]
        half = self._other_half[self._half_of[true]]  # [n, 1, c], 0 in the image's own half of the classes, -inf in the other
        without = self._scores(residual)[:, None]
        check_finite(positions, residuals=residual, scores=without)
        predicted = without.argmax(dim=-1)[:, 0].tolist()
        untouched = [self._right(scores, true)[:, 0].cpu().numpy() for scores in (without, without + half)]
        found = [without] if self._settings.predictions else []
        timer.mark("from_hook")
        encoded = active_latents(self._sae, residual[:, self._encoded])
        offset = self._encoded.start
        active = encoded.within(self._encoded.stop - offset, slice(self._replaced.start - offset, self._replaced.stop - offset))
        x = residual[:, self._replaced].to(torch.float32)
        rest = beside_the_sum(self._sae, x, active, self._settings.error_term, self._settings.output_offset)
        timer.mark("encode")

        def means() -> Tensor:
            return encoded.image_means(len(residual), self._sae.d_sae)

        seen = torch.zeros(len(residual), device=self._device)  # NaN where any score of an image is, or a latent that it is of
        for ranking in self._settings.rankings:
            right: tuple[list[Tensor], list[Tensor]] = ([], [])
            for ranks in self._ranker.ranks(ranking, labels.tolist(), predicted, means):
                timer.mark("rank")
                scores = self._masked_scores(residual, active, ranks, rest, timer)
                seen += scores.sum(dim=(1, 2))
                right[0].append(self._right(scores, true))
                right[1].append(self._right(scores + half, true))
                found += [scores] if self._settings.predictions else []
            masked = [torch.stack(of_orders, dim=2).cpu().numpy() for of_orders in right]
            totals.accuracy[ranking.name].update(labels, untouched[0], masked[0])
            totals.in_half[ranking.name].update(labels, untouched[1], masked[1])
        check_finite(positions, scores=seen[:, None])
        if found:
            totals.add_predictions(_predictions(torch.cat(found, dim=1), positions, labels))
        timer.mark("reduce")
        whole = [of_settings[:, -2, 0] for of_settings in masked] if self._whole else []  # with all kept, any order is the same
        return np.stack([*untouched, *whole], axis=1)

    def _masked_scores(self, residual: Tensor, active: ActiveLatents, ranks: Tensor, rest: Tensor, timer: StageTimer) -> Tensor:
        """[n, m, c] scores under every masked setting of one order."""
        found = []
        for ks in self._ks.split(KS_AT_ONCE):
            variants = masked_residuals(self._sae, residual, self._replaced, active, ranks, ks, rest)
            timer.mark("decode_latents")
            found.append(self._scores(variants.flatten(0, 1)).view(*variants.shape[:2], -1))
            timer.mark("from_hook")
        return torch.cat(found, dim=1)

    @staticmethod
    def _right(scores: Tensor, true: Tensor) -> Tensor:
        """[n, m] bool, whether the largest of scores [n, m, c] is that of the true class [n, 1]."""
        return scores.argmax(dim=-1) == true

    def _scores(self, residual: Tensor) -> Tensor:
        """[n, c] scores of residuals [n, t, d]."""
        return logits(self._backbone.from_hook(residual), self._classifier, self._logit_scale)


def beside_the_sum(
    sae: SparseAutoencoder, x: Tensor, active: ActiveLatents, error_term: ErrorTerm, output_offset: float
) -> Tensor:
    """What a masked reconstruction has beside the sum over its latents: [d] or [n, t, d] float32.

    b_dec and the offset; with the error term also x less its whole reconstruction, so that all latents kept give x again.

    Args:
        sae: the autoencoder.
        x: residuals of the tokens that are replaced, [n, t, d].
        active: their active latents.
        error_term: none or add.
        output_offset: added to every element.
    """
    base = sae.b_dec + output_offset
    return base if error_term == "none" else base + (x - sparse_decode(sae, active).view_as(x))


def masked_residuals(
    sae: SparseAutoencoder, residual: Tensor, replaced: slice, active: ActiveLatents, ranks: Tensor, ks: Tensor, rest: Tensor
) -> Tensor:
    """Residuals under every masked setting, [n, m, t, d] in the order of `masked_settings`.

    Args:
        sae: the autoencoder.
        residual: untouched, [n, t, d].
        replaced: which of the t tokens get a masked reconstruction; the others keep their residual.
        active: active latents of the replaced tokens.
        ranks: [n, s] place of each latent.
        ks: [k] numbers of latents, ascending.
        rest: of `beside_the_sum`.
    """
    on, off = masked_reconstructions(sae, active, ranks, ks, rest)
    masked = torch.stack([on, off], dim=2).flatten(1, 2)
    if masked.shape[2] == residual.shape[1]:
        return masked
    variants = residual[:, None].repeat(1, masked.shape[1], 1, 1).to(torch.float32)
    variants[:, :, replaced] = masked
    return variants


def prediction_columns(rankings: Sequence[Ranking], settings: Sequence[str], seed: int) -> list[str]:
    """Names of the columns of `Predictions`: no_sae, class_on_1, …, and random_{seed}_on_1 for each random order."""
    names = ["no_sae"]
    for ranking in rankings:
        prefixes = [f"random_{seed + order}" for order in range(ranking.orders)] if ranking.name == "random" else [ranking.name]
        names += [f"{prefix}_{setting}" for prefix in prefixes for setting in settings]
    return names


def _predictions(scores: Tensor, positions: np.ndarray, labels: np.ndarray) -> Predictions:
    """Predicted classes and margins of scores [n, columns, c]."""
    classes = scores.argmax(dim=-1)
    true = torch.from_numpy(labels).to(scores.device)[:, None, None].expand(*scores.shape[:2], 1)
    own = scores.gather(2, true)[..., 0]
    others = scores.scatter(2, true, -torch.inf).amax(dim=-1)
    return Predictions(positions, labels, classes.to(torch.int32).cpu().numpy(), (own - others).cpu().numpy())
