"""Right predictions per class and masking setting.

Rows are settings in the order of `settings_of`: no_sae, then on_k and off_k for each k.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from patchsae_ray.measure.arrays import Arrays


def settings_of(ks: Sequence[int]) -> list[str]:
    """Row names: no_sae, on_1, off_1, on_2, off_2, …"""
    return ["no_sae", *(f"{switch}_{k}" for k in ks for switch in ("on", "off"))]


class MaskingAccuracy:
    """Counts of right predictions [settings, c] and of images [c]; integers, so exact for any split.

    Args:
        num_settings: rows.
        num_classes: c.
    """

    def __init__(self, num_settings: int, num_classes: int) -> None:
        self.correct = np.zeros((num_settings, num_classes), dtype=np.int64)
        self.images = np.zeros(num_classes, dtype=np.int64)

    def update(self, predictions: np.ndarray, label: int) -> None:
        """Take in one image: its predicted class under each setting [settings], and its true class."""
        self.images[label] += 1
        self.correct[:, label] += predictions == label

    def merge(self, other: "MaskingAccuracy") -> None:
        """Take in another's images."""
        self.correct += other.correct
        self.images += other.images

    def table(self, ks: Sequence[int]) -> pd.DataFrame:
        """metrics.csv: a row a setting, a column a class; percent of the class's images predicted as the class.

        A class without images has no percentage: NaN, an empty cell in the file.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            percent = 100 * self.correct / self.images
        columns = [str(label) for label in range(len(self.images))]
        return pd.DataFrame(percent, index=pd.Index(settings_of(ks), name="masking"), columns=columns)

    def accuracy(self) -> np.ndarray:
        """[settings]: percent of all images predicted as their class."""
        return 100 * self.correct.sum(axis=1) / max(1, int(self.images.sum()))

    def to_arrays(self) -> Arrays:
        return {"correct": self.correct, "images": self.images}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "MaskingAccuracy":
        made = cls(*arrays["correct"].shape)
        made.correct, made.images = arrays["correct"], arrays["images"]
        return made
