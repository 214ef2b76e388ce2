"""Which images were right, a bit each: what two runs on the same images are compared by, pair by pair.

Shapes: n images, w things that were tried on each, N images of the data set, c classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.intervals import change_interval, spread_of_changes

NOT_MEASURED = -1


def tried(whole: bool) -> tuple[str, ...]:
    """What a steering run says of each image, by name: `_in_half` is among the classes of the image's own half.

    Args:
        whole: whether all latents kept, the autoencoder's reconstruction, is among the settings.
    """
    return ("no_sae", "no_sae_in_half", *(("reconstruction", "reconstruction_in_half") if whole else ()))


class Outcomes:
    """By position: each image's class, and w bits that say what was right; w bits and 2 or 4 bytes an image.

    Args:
        tried: w.
    """

    def __init__(self, tried: int) -> None:
        self.tried = tried
        self._runs: list[tuple[int, np.ndarray, np.ndarray]] = []
        """Of runs of successive images: the first position, labels [n] (-1 where not measured), and bits [w, ceil(n / 8)]."""

    def update(self, positions: np.ndarray, labels: np.ndarray, right: np.ndarray) -> None:
        """Take in images, all near each other, as a unit's are.

        Args:
            positions: [n] int64, ascending.
            labels: [n] true classes.
            right: [n, w] bool.
        """
        if not len(positions):
            return
        first, span = int(positions[0]), int(positions[-1] - positions[0]) + 1
        classes = np.full(span, NOT_MEASURED, dtype=np.int16 if labels.max() < 2**15 else np.int32)
        bits = np.zeros((self.tried, span), dtype=bool)
        classes[positions - first], bits[:, positions - first] = labels, right.T
        self._runs.append((first, classes, np.packbits(bits, axis=1)))

    def merge(self, other: "Outcomes") -> None:
        """Take in another's images."""
        self._runs += other._runs

    def blocks(self, num_images: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """By position, `size` images at a time: labels [b] int32, -1 where not measured, and right [w, b] bool.

        Args:
            num_images: N.
            size: of a block, the last one may be smaller.
        """
        runs, index = sorted(self._runs, key=lambda run: run[0]), 0
        for start in range(0, num_images, size):
            stop = min(start + size, num_images)
            labels = np.full(stop - start, NOT_MEASURED, dtype=np.int32)
            right = np.zeros((self.tried, stop - start), dtype=bool)
            while index < len(runs) and runs[index][0] < stop:
                first, classes, bits = runs[index]
                last = first + len(classes)
                low, high = max(first, start), min(last, stop)
                labels[low - start : high - start] = classes[low - first : high - first]
                unpacked = np.unpackbits(bits, axis=1, count=len(classes))
                right[:, low - start : high - start] = unpacked[:, low - first : high - first]
                if last > stop:
                    break
                index += 1
            yield labels, right

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        runs = sorted(self._runs, key=lambda run: run[0])
        return {
            "tried": np.array([self.tried]),
            "first": np.array([first for first, _, _ in runs], dtype=np.int64),
            "sizes": np.array([len(classes) for _, classes, _ in runs], dtype=np.int64),
            "labels": np.concatenate([np.zeros(0, np.int16), *(classes for _, classes, _ in runs)]),
            "bits": np.concatenate([np.zeros((self.tried, 0), np.uint8), *(bits for _, _, bits in runs)], axis=1),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Outcomes":
        """The reverse of `to_arrays`."""
        made = cls(int(arrays["tried"][0]))
        sizes = arrays["sizes"]
        labels = np.split(arrays["labels"], np.cumsum(sizes)[:-1])
        bits = np.split(arrays["bits"], np.cumsum(-(-sizes // 8))[:-1], axis=1)
        made._runs = list(zip(arrays["first"].tolist(), labels, bits, strict=True)) if len(sizes) else []
        return made


@dataclass(frozen=True)
class PairedChange:
    """What becomes of one thing from one model to another, on the same images."""

    images: int
    """That both measured."""
    gained: int
    """Right with the second model alone."""
    lost: int
    """Right with the first alone."""
    change: np.ndarray
    """[3] value, low and high of the change of the mean over classes, from -1 to 1; NaN where nothing is known of it."""


class PairedCounts:
    """Images by class on which two models differ, of each of w things that were tried with both; integers.

    Args:
        tried: w.
        num_classes: c.
    """

    def __init__(self, tried: int, num_classes: int) -> None:
        self.images = np.zeros(num_classes, dtype=np.int64)
        """[c] that both measured."""
        self.gained = np.zeros((tried, num_classes), dtype=np.int64)
        """[w, c] right with the second model alone."""
        self.lost = np.zeros((tried, num_classes), dtype=np.int64)
        """[w, c] right with the first alone."""

    def update(self, labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        """Take in images that both measured: classes [n], and what was right with each model [w, n] bool."""
        c = len(self.images)
        self.images += np.bincount(labels, minlength=c)
        for counts, differ in ((self.gained, second & ~first), (self.lost, first & ~second)):
            counts += np.stack([np.bincount(labels[row], minlength=c) for row in differ])

    def change(self, index: int, classes: slice = slice(None)) -> PairedChange:
        """Of one thing, over some of the classes.

        An image's change is -1, 0 or 1, and its spread is taken within classes (measure/intervals.py). What the models have
        in common, the images that both get right or wrong, drops out: so the interval is narrower than the two models' own.
        Where no image changes it still has a width: of the images of other samples some may.
        """
        n = self.images[classes]
        there = n > 0
        n, gained, lost = n[there], self.gained[index, classes][there], self.lost[index, classes][there]
        if not len(n):
            return PairedChange(0, 0, 0, np.full(3, np.nan))
        weights = np.full(len(n), 1 / len(n))
        spread, added = spread_of_changes(weights, n, gained, lost, gained + lost)
        each = weights / n
        change = change_interval(np.asarray(gained @ each), np.asarray(lost @ each), spread, added)
        return PairedChange(int(n.sum()), int(gained.sum()), int(lost.sum()), change)
