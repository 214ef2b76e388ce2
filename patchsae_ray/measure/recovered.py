"""What CLIP still sees through an autoencoder: zero-shot classification with other residuals in place, as mergeable sums.

README.md beside this file defines every metric. Shapes: n images, m conditions, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.intervals import Spread, equal_weight_images, mean_interval, share_interval, spread_of_images
from patchsae_ray.measure.sums import CompensatedSum

Interval = tuple[float, float]
"""Low and high; NaN where nothing is known of the spread."""


@dataclass(frozen=True)
class Condition:
    """What the rest of the tower is given at the hook in place of the residual."""

    what: str
    """no_sae (the residual itself), reconstruction, zero_ablation or mean_ablation."""
    tokens: str
    """Whose residual is replaced: all that are measured, or those of one type; the others keep theirs. Empty for no_sae."""

    @property
    def name(self) -> str:
        """reconstruction, reconstruction_cls, …"""
        return self.what if self.tokens in ("", "all") else f"{self.what}_{self.tokens}"


def conditions_of(types: Sequence[str]) -> list[Condition]:
    """The conditions, m of them; a type of tokens has one of its own where there are several."""
    apart = [Condition("reconstruction", kind) for kind in types] if len(types) > 1 else []
    ablations = [Condition(f"{value}_ablation", "all") for value in ("zero", "mean")]
    return [Condition("no_sae", ""), Condition("reconstruction", "all"), *apart, *ablations]


@dataclass(frozen=True)
class ZeroShotResult:
    """Zero-shot classification of the labelled images, by the condition's name."""

    images: int
    classes: int
    """That have images."""
    top1: dict[str, float]
    """Share of the images whose largest score is that of their class."""
    top1_mean_over_classes: dict[str, float]
    """That share within each class, averaged over the classes that have images."""
    contrastive_loss: dict[str, float]
    """Mean over images of the cross-entropy of the scores (backbone/zero_shot.py `logits`, so scaled) against the class."""
    intervals: dict[str, dict[str, Interval]]
    """95 %, of top1, top1_mean_over_classes and contrastive_loss by condition, and of loss_recovered by ablation."""

    def loss_recovered(self, ablation: str) -> float:
        """`loss_recovered` of the reconstruction of all measured tokens, against zero_ablation or mean_ablation."""
        found = self.contrastive_loss
        return loss_recovered(found[ablation], found["reconstruction"], found["no_sae"])


def loss_recovered(ablated: float, reconstructed: float, clean: float) -> float:
    """(L_ablated - L_reconstruction) / (L_ablated - L_clean), as in Gated SAEs (arXiv 2404.16014).

    1 for a perfect reconstruction, 0 for one no better than the ablation, below 0 for a worse one. NaN where the ablation
    costs nothing (L_ablated <= L_clean): there is nothing to recover then, and the quotient would mean the opposite.
    """
    return (ablated - reconstructed) / (ablated - clean) if ablated > clean else float("nan")


class ZeroShotMetrics:
    """Sums for `ZeroShotResult`.

    Args:
        num_conditions: m.
        num_classes: c.
    """

    def __init__(self, num_conditions: int, num_classes: int) -> None:
        self.images = np.zeros(num_classes, dtype=np.int64)
        """[c]."""
        self.right = np.zeros((num_conditions, num_classes), dtype=np.int64)
        """[m, c]: images of each class that are predicted as it."""
        self.losses = CompensatedSum(num_conditions)
        """[m]: sum of the images' cross-entropies."""
        self.products = CompensatedSum((num_conditions, num_conditions))
        """[m, m]: sum over images of the products of two conditions' cross-entropies."""

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Take in images by their scores [m, n, c] and true classes [n] int64."""
        true = labels.expand(len(scores), -1)[..., None]
        losses = -scores.to(torch.float64).log_softmax(dim=-1).gather(2, true)[..., 0]  # [m, n]
        self.losses.add(losses.sum(dim=1).cpu().numpy())
        self.products.add((losses @ losses.T).cpu().numpy())
        classes, right = labels.cpu().numpy(), (scores.argmax(dim=-1) == labels).cpu().numpy()
        np.add.at(self.images, classes, 1)
        for row, of_condition in zip(self.right, right, strict=True):
            np.add.at(row, classes[of_condition], 1)

    def merge(self, other: "ZeroShotMetrics") -> None:
        """Take in another's images."""
        self.images += other.images
        self.right += other.right
        self.losses.merge(other.losses)
        self.products.merge(other.products)

    def result(self, conditions: Sequence[Condition]) -> ZeroShotResult | None:
        """The metrics, or None where no image had a label."""
        there, total = self.images > 0, int(self.images.sum())
        if not total:
            return None
        names = [condition.name for condition in conditions]

        def by_name(values: np.ndarray) -> dict[str, float]:
            return dict(zip(names, values.tolist(), strict=True))

        return ZeroShotResult(
            images=total,
            classes=int(there.sum()),
            top1=by_name(self.right.sum(axis=1) / total),
            top1_mean_over_classes=by_name((self.right[:, there] / self.images[there]).mean(axis=1)),
            contrastive_loss=by_name(self.losses.high / total),
            intervals=self._intervals(names),
        )

    def _intervals(self, names: list[str]) -> dict[str, dict[str, Interval]]:
        """Of `ZeroShotResult`. README.md beside this file has the formulas."""
        n, there = np.array([self.images.sum()]), self.images > 0
        whole, by_class = self.right.sum(axis=1, keepdims=True), self.right[:, there]
        weights = np.full(by_class.shape[1], 1 / by_class.shape[1])
        sizes, one = self.images[there], np.ones(1)
        shares = {
            "top1": share_interval(whole[:, 0] / n[0], spread_of_images(one, n, whole, whole), n[0]),
            "top1_mean_over_classes": share_interval(
                by_class @ (weights / sizes),
                spread_of_images(weights, sizes, by_class, by_class),
                equal_weight_images(weights, sizes),
            ),
        }
        means, degrees = self.losses.high / n[0], n - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            covariance = (self.products.high - n[0] * np.outer(means, means)) / degrees / n[0]  # of the means
        variances = covariance.diagonal().clip(min=0)
        losses = mean_interval(means, Spread(variances, np.broadcast_to(degrees, variances.shape)))
        found = {
            metric: {name: _low_high(of_condition) for name, of_condition in zip(names, values, strict=True)}
            for metric, values in {**shares, "contrastive_loss": losses}.items()
        }
        ablations = [name for name in names if name.endswith("_ablation")]
        return {**found, "loss_recovered": {name: _recovered(name, names, means, covariance, degrees) for name in ablations}}

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        sums = {"losses": self.losses.stacked(), "products": self.products.stacked()}
        return {"images": self.images, "right": self.right, **sums}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "ZeroShotMetrics":
        """The reverse of `to_arrays`."""
        made = cls(0, 0)
        made.images, made.right = arrays["images"], arrays["right"]
        made.losses, made.products = (CompensatedSum.from_stacked(arrays[name]) for name in ("losses", "products"))
        return made


def _low_high(estimate: np.ndarray) -> Interval:
    return float(estimate[1]), float(estimate[2])


def _recovered(ablation: str, names: Sequence[str], means: np.ndarray, covariance: np.ndarray, degrees: np.ndarray) -> Interval:
    """The interval of `loss_recovered`, by the delta method: the variance of g · L, g its gradient by the three losses.

    With R = (A - B) / (A - C) it is (1 - R, -1, R) / (A - C), for A of the ablation, B of the reconstruction, C of no_sae.
    """
    if "reconstruction" not in names:
        return float("nan"), float("nan")
    places = [names.index(name) for name in (ablation, "reconstruction", "no_sae")]
    ablated, reconstructed, clean = means[places].tolist()
    recovered = loss_recovered(ablated, reconstructed, clean)
    gradient = np.array([1 - recovered, -1, recovered]) / (ablated - clean) if recovered == recovered else np.full(3, np.nan)
    variance = np.asarray(gradient @ covariance[np.ix_(places, places)] @ gradient).clip(min=0)
    return _low_high(mean_interval(np.asarray(recovered), Spread(variance, degrees[0])))
