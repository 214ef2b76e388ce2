"""Right predictions per class and masking setting, exact for any split of the images, and intervals from them.

Rows are settings in the order of `settings_of`: no_sae, then on_k and off_k for each k.
Shapes: m masked settings (two a k), c classes, r orders of one ranking.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from patchsae_ray.measure.arrays import Arrays

RESAMPLES = 1000
LEVEL = 0.95
_CLASSES_AT_ONCE = 256


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
    """Percentages with their intervals; rows as in `settings_of`, columns value, low, high."""

    mean_over_classes: np.ndarray
    """[1 + m, 3]: each class's share of right predictions, averaged over the classes that have images."""
    over_images: np.ndarray
    """[1 + m, 3]: share of right predictions among all images."""
    change: np.ndarray
    """[1 + m, 3]: `mean_over_classes` less that without the autoencoder, image by image."""


class MaskingAccuracy:
    """Images by class, by whether CLIP alone is right, and by how many of a ranking's orders are right; integers.

    Args:
        num_masked: m.
        num_classes: c.
        orders: r, 1 but for several random orders.
    """

    def __init__(self, num_masked: int, num_classes: int, orders: int = 1) -> None:
        self.counts = np.zeros((num_masked, num_classes, 2, orders + 1), dtype=np.int64)

    def update(self, labels: np.ndarray, right_without: np.ndarray, right: np.ndarray) -> None:
        """Take in n images.

        Args:
            labels: [n] true classes.
            right_without: [n] bool, whether the prediction without the autoencoder is right.
            right: [n, m] in how many of the orders the prediction is right.
        """
        settings = np.arange(len(self.counts))[None, :]
        np.add.at(self.counts, (settings, labels[:, None], right_without.astype(np.int64)[:, None], right), 1)

    def only(self, classes: slice) -> "MaskingAccuracy":
        """The same of some of the classes."""
        made = MaskingAccuracy(len(self.counts), 0)
        made.counts = self.counts[:, classes]
        return made

    def merge(self, other: "MaskingAccuracy") -> None:
        """Take in another's images."""
        self.counts += other.counts

    @property
    def images(self) -> np.ndarray:
        """[c] images of each class."""
        return np.asarray(self.counts[0].sum(axis=(1, 2)))

    @property
    def _shares(self) -> np.ndarray:
        """[r + 1]: share of orders that are right."""
        return np.linspace(0, 1, self.counts.shape[3])

    def table(self, ks: Sequence[int]) -> pd.DataFrame:
        """metrics.csv: a row a setting, a column a class; percent of the class's images predicted as the class.

        Several random orders are averaged. A class without images has no percentage: NaN, an empty cell in the file.
        """
        without = self.counts[0, :, 1].sum(axis=-1)
        masked = self.counts.sum(axis=2) @ self._shares
        with np.errstate(invalid="ignore", divide="ignore"):
            percent = 100 * np.concatenate([without[None], masked]) / self.images
        columns = [str(label) for label in range(len(self.images))]
        return pd.DataFrame(percent, index=pd.Index(settings_of(ks), name="masking"), columns=columns)

    def curve(self, seed: int, resamples: int = RESAMPLES) -> MaskingCurve:
        """Percentages over all classes, with percentile bootstrap intervals (Efron 1979) of LEVEL over images.

        Images are drawn again within their classes. A class's images differ only by the cell of `counts` that they are in,
        so a draw of them is a multinomial one of the cells, and no image needs to be kept.

        Args:
            seed: of the resamples.
            resamples: how many.
        """
        there = self.images > 0
        n = self.images[there]
        if not len(n):
            nothing = np.full((1 + len(self.counts), 3), np.nan)
            return MaskingCurve(nothing, nothing, nothing)
        # What an image in a cell of [2, r + 1] scores: without the autoencoder, with it, and the difference.
        without, masked = (grid.ravel() for grid in np.meshgrid([0.0, 1.0], self._shares, indexing="ij"))
        scores = np.stack([without, masked, masked - without], axis=1)
        rng = np.random.default_rng(seed)
        cells = self.counts[:, there].reshape(len(self.counts), len(n), -1)
        found = np.stack([_estimates(of_setting, n, scores, rng, resamples) for of_setting in cells])  # [m, 2, 3, 3]
        by_class, by_image = found[:, 0], found[:, 1]
        return MaskingCurve(
            mean_over_classes=np.concatenate([by_class[:1, 0], by_class[:, 1]]),
            over_images=np.concatenate([by_image[:1, 0], by_image[:, 1]]),
            change=np.concatenate([np.zeros((1, 3)), by_class[:, 2]]),
        )

    def to_arrays(self) -> Arrays:
        """Everything as arrays: of the counts, which are mostly 0, the others and their places."""
        places = np.flatnonzero(self.counts)
        return {"shape": np.array(self.counts.shape), "places": places, "numbers": self.counts.ravel()[places]}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "MaskingAccuracy":
        """The reverse of `to_arrays`."""
        num_masked, num_classes, _, cells = arrays["shape"].tolist()
        made = cls(num_masked, num_classes, cells - 1)
        made.counts.ravel()[arrays["places"]] = arrays["numbers"]
        return made


def _estimates(cells: np.ndarray, n: np.ndarray, scores: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Percent by classes and by images [2], of each score [3], as value, low and high [3].

    Args:
        cells: [c, q] images by class and cell.
        n: [c] images, none of them 0.
        scores: [q, 3] what an image in a cell scores.
        rng: of the resamples.
        resamples: how many.
    """
    drawn = np.zeros((resamples, 2, 3))
    value = np.zeros((2, 3))
    for start in range(0, len(n), _CLASSES_AT_ONCE):
        part = slice(start, start + _CLASSES_AT_ONCE)
        weights = np.stack([100 / (len(n) * n[part]), np.full(len(n[part]), 100 / n.sum())])  # [2, classes]
        value += weights @ (cells[part] @ scores)
        draws = rng.multinomial(n[part], cells[part] / n[part, None], size=(resamples, len(n[part])))
        drawn += weights @ (draws @ scores)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.stack([value, low, high], axis=-1)
