"""An image that spoils a whole pass: how an actor says so, and how it reaches the user as one line.

A worker raises `ImageError`. pipelines/units.py puts it in the place of the unit's partial result, for an exception in an
actor would come with pages of Ray Data's own log; pipelines/merging.py raises it again, and adds the image's path.
"""

import json

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import Arrays

_KEY = "image_error"


class ImageError(UserError):
    """An image with which a pass cannot go on.

    Args:
        position: of the image in the data set.
        said: what is wrong with it, and what would be right.
        path: of the image, once it is known.
    """

    def __init__(self, position: int, said: str, path: str = "") -> None:
        super().__init__(position, said, path)
        self.position, self.said, self.path = position, said, path

    def __str__(self) -> str:
        named = f" ({self.path})" if self.path else ""
        return f"the image at position {self.position}{named}: {self.said}"

    def to_arrays(self) -> Arrays:
        """The error in place of a partial result."""
        return {_KEY: np.frombuffer(json.dumps([self.position, self.said]).encode(), dtype=np.uint8)}

    @staticmethod
    def raise_from(arrays: Arrays) -> None:
        """Raises: ImageError where a partial result is one."""
        if _KEY in arrays:
            position, said = json.loads(arrays[_KEY].tobytes())
            raise ImageError(position, said)


def check_finite(positions: np.ndarray, **values: Tensor) -> None:
    """See that what was computed of a batch's images is finite; one pass over it, and one wait for its device.

    A sum in float32 is NaN or infinite where a term is: so an image's values are added up, and only the sums looked at.

    Args:
        positions: [n] int64, of the images in the data set.
        values: what it is, in the plural → [n, …], on one device.

    Raises: ImageError for the first image of which something is NaN or infinite.
    """
    sums = torch.stack([found.flatten(1).sum(dim=1, dtype=torch.float32) for found in values.values()], dim=1)  # [n, values]
    bad = sums.isfinite().logical_not_()
    if not bool(bad.any()):
        return
    image, what = bad.nonzero()[0].tolist()
    said = f"its {list(values)[what]} are not finite (NaN or infinite); --precision fp32, or sound weights, would be right"
    raise ImageError(int(positions[image]), said)


def check_labels(positions: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Raises: ImageError for the first image whose label [n] int64 has no class."""
    for index in np.flatnonzero(labels >= num_classes)[:1].tolist():
        raise ImageError(int(positions[index]), f"its label is {labels[index]}, but there are {num_classes} class names")
