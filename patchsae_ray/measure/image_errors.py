"""An image that spoils a whole pass: how an actor says so, and how it reaches the user as one line."""

import json

import numpy as np

from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import Arrays

_KEY = "image_error"


class ImageError(UserError):
    """An image with which a pass cannot go on.

    An exception in an actor would come with pages of Ray Data's own log. So a worker gives `to_arrays` as its unit's
    partial result, and what merges partial results calls `raise_from`.

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
