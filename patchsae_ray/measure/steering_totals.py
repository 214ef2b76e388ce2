"""What a steering pass comes to: right predictions by ranking, what was right of each image, and predictions on request."""

from dataclasses import dataclass

import numpy as np

from patchsae_ray.measure.arrays import Arrays, prefixed, without_prefix
from patchsae_ray.measure.masking import MaskingAccuracy
from patchsae_ray.measure.outcomes import Outcomes

PARTIALS = 2
"""Version of `SteeringTotals`' arrays: partial results of another version are not read."""


@dataclass(frozen=True)
class Predictions:
    """Each image's predictions, one column without the autoencoder, then the settings of each order of each ranking."""

    positions: np.ndarray
    """[n] int64."""
    labels: np.ndarray
    """[n] int64."""
    classes: np.ndarray
    """[n, columns] int32, predicted."""
    margins: np.ndarray
    """[n, columns] float32: score of the true class less the largest other; above 0 where the prediction is right."""

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        return {"positions": self.positions, "labels": self.labels, "classes": self.classes, "margins": self.margins}


class SteeringTotals:
    """What came of any number of units, mergeable in any order."""

    def __init__(self) -> None:
        self.accuracy: dict[str, MaskingAccuracy] = {}
        """By the ranking's name."""
        self.in_half: dict[str, MaskingAccuracy] = {}
        """The same, each image classified among its own half of the classes alone (base or novel)."""
        self.outcomes: Outcomes | None = None
        """What `tried` names, of each image."""
        self._predictions: list[Predictions] = []

    def add(self, arrays: Arrays) -> None:
        """Take in what a unit, or another's `to_arrays`, gave."""
        for kind, kept in (("accuracy", self.accuracy), ("in_half", self.in_half)):
            of_kind = without_prefix(kind, arrays)
            for ranking in sorted({name.split("/")[0] for name in of_kind}):
                found = MaskingAccuracy.from_arrays(without_prefix(ranking, of_kind))
                if ranking in kept:
                    kept[ranking].merge(found)
                else:
                    kept[ranking] = found
        outcomes, predictions = without_prefix("outcomes", arrays), without_prefix("predictions", arrays)
        if outcomes and self.outcomes is None:
            self.outcomes = Outcomes.from_arrays(outcomes)
        elif outcomes and self.outcomes is not None:
            self.outcomes.merge(Outcomes.from_arrays(outcomes))
        if predictions:
            self._predictions.append(Predictions(**predictions))

    def add_predictions(self, predictions: Predictions) -> None:
        """Take in some images' predictions."""
        self._predictions.append(predictions)

    def predictions(self) -> Predictions | None:
        """All images' predictions by position; None where none were kept."""
        if not self._predictions:
            return None
        columns = zip(*(part.to_arrays().values() for part in self._predictions), strict=True)
        positions, labels, classes, margins = (np.concatenate(column) for column in columns)
        order = np.argsort(positions)
        return Predictions(positions[order], labels[order], classes[order], margins[order])

    def to_arrays(self) -> Arrays:
        """Everything as arrays."""
        arrays: Arrays = {}
        for kind, kept in (("accuracy", self.accuracy), ("in_half", self.in_half)):
            for ranking, accuracy in kept.items():
                arrays.update(prefixed(f"{kind}/{ranking}", accuracy.to_arrays()))
        if self.outcomes is not None:
            arrays.update(prefixed("outcomes", self.outcomes.to_arrays()))
        predictions = self.predictions()
        if predictions is not None:
            arrays.update(prefixed("predictions", predictions.to_arrays()))
        return arrays
