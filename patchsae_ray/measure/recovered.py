"""What CLIP still sees through an autoencoder: zero-shot classification with other residuals in place, as mergeable sums.

README.md beside this file defines every metric. Shapes: n images, m conditions, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.sums import CompensatedSum


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

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Take in images by their scores [m, n, c] and true classes [n] int64."""
        true = labels.expand(len(scores), -1)[..., None]
        losses = -scores.to(torch.float64).log_softmax(dim=-1).gather(2, true)[..., 0]  # [m, n]
        self.losses.add(losses.sum(dim=1).cpu().numpy())
        classes, right = labels.cpu().numpy(), (scores.argmax(dim=-1) == labels).cpu().numpy()
        np.add.at(self.images, classes, 1)
        for row, of_condition in zip(self.right, right, strict=True):
            np.add.at(row, classes[of_condition], 1)

    def merge(self, other: "ZeroShotMetrics") -> None:
        """Take in another's images."""
        self.images += other.images
        self.right += other.right
        self.losses.merge(other.losses)

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
        )

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        return {"images": self.images, "right": self.right, "losses": self.losses.stacked()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "ZeroShotMetrics":
        """The reverse of `to_arrays`."""
        made = cls(0, 0)
        made.images, made.right = arrays["images"], arrays["right"]
        made.losses = CompensatedSum.from_stacked(arrays["losses"])
        return made
