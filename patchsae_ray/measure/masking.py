"""Right predictions per class and masking setting, exact for any split of the images, and intervals from them.

Rows are settings in the order of `settings_of`: no_sae, then on_k and off_k for each k.
Shapes: n images, m masked settings (two a k), c classes, r orders of one ranking.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.intervals import (
    Spread,
    change_interval,
    class_variances,
    equal_weight_images,
    share_interval,
    spread_of_changes,
    spread_of_images,
)


def halves_of(num_classes: int) -> dict[str, slice]:
    """Base classes, the first half, and novel ones, the rest; the middle one of an odd number is a base class."""
    middle = -(-num_classes // 2)
    return {"base": slice(0, middle), "novel": slice(middle, num_classes)}


def masked_settings(ks: Sequence[int]) -> list[str]:
    """on_1, off_1, on_2, off_2, …"""
    return [f"{switch}_{k}" for k in ks for switch in ("on", "off")]


def settings_of(ks: Sequence[int]) -> list[str]:
    """Row names of metrics.csv: no_sae, on_1, off_1, on_2, off_2, …"""
    return ["no_sae", *masked_settings(ks)]


@dataclass(frozen=True)
class MaskingCurve:
    """Percentages with their intervals; rows as in `settings_of`, columns value, low, high.

    low and high are NaN where no class has two images.
    """

    mean_over_classes: np.ndarray
    """[1 + m, 3]: each class's share of right predictions, averaged over the classes that have images."""
    over_images: np.ndarray
    """[1 + m, 3]: share of right predictions among all images."""
    change: np.ndarray
    """[1 + m, 3]: `mean_over_classes` less that without the autoencoder, image by image."""


class MaskingAccuracy:
    """Sums over images of what is right, by class; integers.

    Of image i let w be 1 where CLIP alone is right, s_j where it is right under order j, and R = s_1 + … + s_r.

    Args:
        num_masked: m.
        num_classes: c.
        orders: r, 1 but for several random orders.
    """

    def __init__(self, num_masked: int, num_classes: int, orders: int = 1) -> None:
        self.images = np.zeros(num_classes, dtype=np.int64)
        """[c]."""
        self.right_without = np.zeros(num_classes, dtype=np.int64)
        """[c]: sum of w."""
        self.right = np.zeros((num_masked, orders, num_classes), dtype=np.int64)
        """[m, r, c]: sum of s_j."""
        self.squares = np.zeros((num_masked, num_classes), dtype=np.int64)
        """[m, c]: sum of R²."""
        self.both = np.zeros((num_masked, num_classes), dtype=np.int64)
        """[m, c]: sum of w R."""

    def update(self, labels: np.ndarray, right_without: np.ndarray, right: np.ndarray) -> None:
        """Take in n images.

        Args:
            labels: [n] true classes.
            right_without: [n] bool, whether the prediction without the autoencoder is right.
            right: [n, m, r] bool, whether it is right under each setting of each order.
        """
        if not len(labels):
            return
        order = np.argsort(labels, kind="stable")
        classes, starts = np.unique(labels[order], return_index=True)
        without, right = right_without[order].astype(np.int64), right[order].astype(np.int64)
        number = right.sum(axis=2)

        def by_class(values: np.ndarray) -> np.ndarray:
            return np.moveaxis(np.add.reduceat(values, starts, axis=0), 0, -1)

        self.images[classes] += by_class(np.ones_like(without))
        self.right_without[classes] += by_class(without)
        self.right[..., classes] += by_class(right)
        self.squares[:, classes] += by_class(number**2)
        self.both[:, classes] += by_class(number * without[:, None])

    def only(self, classes: slice | np.ndarray) -> "MaskingAccuracy":
        """The same of some of the classes: a slice of them, or a mask [c] bool."""
        made = MaskingAccuracy(0, 0)
        for name, values in vars(self).items():
            setattr(made, name, values[..., classes])
        return made

    def merge(self, other: "MaskingAccuracy") -> None:
        """Take in another's images."""
        for name, values in vars(self).items():
            values += getattr(other, name)

    @property
    def orders(self) -> int:
        """r."""
        return self.right.shape[1]

    def table(self, ks: Sequence[int]) -> pd.DataFrame:
        """metrics.csv: a row a setting, a column a class; percent of the class's images predicted as the class.

        Several random orders are averaged. A class without images has no percentage: NaN, an empty cell in the file.
        """
        masked = self.right.sum(axis=1) / self.orders
        with np.errstate(invalid="ignore", divide="ignore"):
            percent = 100 * np.concatenate([self.right_without[None], masked]) / self.images
        columns = [str(label) for label in range(len(self.images))]
        return pd.DataFrame(percent, index=pd.Index(settings_of(ks), name="masking"), columns=columns)

    def curve(self) -> MaskingCurve:
        """Percentages over all classes, with intervals over other images of the same classes and other random orders."""
        there = self.only(self.images > 0)
        n = there.images
        if not len(n):
            nothing = np.full((1 + len(self.right), 3), np.nan)
            return MaskingCurve(nothing, nothing, nothing)
        by_class, by_image = np.full(len(n), 1 / len(n)), n / n.sum()
        return MaskingCurve(100 * there._shares(by_class), 100 * there._shares(by_image), 100 * there._changes(by_class))

    def _shares(self, weights: np.ndarray) -> np.ndarray:
        """[1 + m, 3] shares with their intervals, of classes that all have images and weigh as `weights` [c] says."""
        n, r, without = self.images, self.orders, self.right_without[None]
        sums = np.concatenate([without, self.right.sum(axis=1) / r])
        spread = spread_of_images(weights, n, sums, np.concatenate([without, self.squares / r**2]))
        return share_interval(sums @ (weights / n), self._with_orders(weights, spread), equal_weight_images(weights, n))

    def _changes(self, weights: np.ndarray) -> np.ndarray:
        """[1 + m, 3] what the shares are above that of no_sae, likewise; of no_sae itself 0."""
        n, r, without = self.images, self.orders, self.right_without[None]
        right, both, squares = (
            np.concatenate([without, values]) for values in (self.right.sum(axis=1) / r, self.both / r, self.squares / r**2)
        )
        gained, lost = right - both, without - both
        spread, added = spread_of_changes(weights, n, gained, lost, squares - 2 * both + without)
        each = weights / n
        changes = change_interval(gained @ each, lost @ each, self._with_orders(weights, spread), added)
        changes[0] = 0
        return changes

    def _with_orders(self, weights: np.ndarray, images: Spread) -> Spread:
        """The spread over other images and other orders, of that over other images alone; [1 + m], no_sae first.

        A mean over n images and r orders, both drawn at random, has the variance O / r + I / n + X / (n r) of two crossed
        random effects (Searle, Casella and McCulloch 1992, Variance Components, 4.3). Of their estimates that between the
        orders' means, over r, holds O / r + X / (n r), that between the images' means I / n + X / (n r), and the mean square
        of what neither explains X: so the sum of the first two less the third, and no less than either. The degrees of freedom
        are Satterthwaite's (1946), so that five orders count as five.
        """
        n, r = self.images, self.orders
        if r == 1:
            return images
        shares = self.right / n  # [m, r, c]
        between = (shares @ weights).var(axis=1, ddof=1) / r
        mean, of_images = shares.mean(axis=1), self.squares / r**2
        # sum over images and orders of (s - its image's mean - its order's mean + the class's mean)², with s² = s
        rest = r * n * mean - r * of_images - n * (shares**2).sum(axis=1) + n * r * mean**2
        # class_variances(n, 0, x) is x / (n - 1), and for classes of one image what the others have
        crossed = (weights**2 / n * class_variances(n, 0 * rest, rest / (r - 1))).sum(axis=1) / r
        variance = np.maximum(between + images.variance[1:] - crossed, np.maximum(between, images.variance[1:]))
        with np.errstate(invalid="ignore", divide="ignore"):
            known = between**2 / (r - 1) + images.variance[1:] ** 2 / images.degrees[1:]
            degrees = np.where(known > 0, variance**2 / known, images.degrees[1:])
        return Spread(
            np.concatenate([images.variance[:1], variance]), np.concatenate([images.degrees[:1], np.fmax(degrees, 1)])
        )

    def to_arrays(self) -> Arrays:
        """Everything as arrays: of the classes that have images, in as few bytes as the numbers take."""
        classes = np.flatnonzero(self.images)
        sums = {name: _narrow(values[..., classes]) for name, values in vars(self).items()}
        return {"classes": classes, "shape": np.array([*self.right.shape]), **sums}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "MaskingAccuracy":
        """The reverse of `to_arrays`."""
        num_masked, orders, num_classes = arrays["shape"].tolist()
        made = cls(num_masked, num_classes, orders)
        for name, values in vars(made).items():
            values[..., arrays["classes"]] = arrays[name]
        return made


def _narrow(counts: np.ndarray) -> np.ndarray:
    """The same numbers, none below 0, in the smallest type that holds them."""
    return counts.astype(np.min_scalar_type(counts.max(initial=0)))
