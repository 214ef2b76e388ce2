"""Bytes → pixels, as Hugging Face's CLIP processor makes them; an unreadable image is a reason, not a crash."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchsae_ray.errors import first_line


class BadImage(Exception):
    """The bytes are no image that can be read; the message is the reason, in one line."""


def decode(data: bytes, size: int) -> np.ndarray:
    """Image bytes → uint8 [size, size, 3].

    RGB; the shorter side to `size`, the longer to int(size * long / short), bicubic on uint8; the crop begins at
    ((h - size) // 2, (w - size) // 2), rounded down. Of an animation the first frame.

    Raises: BadImage with the reason.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                return crop(resize(to_rgb(opened), size), size)
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"too many pixels: {first_line(error)}") from error
    except Exception as error:  # a damaged file makes its decoder raise anything; the image is at fault in each case
        raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; 16-bit greys are scaled to 8 bits, where PIL's own conversion would clip them."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def resize(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size`, bicubic."""
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    new = (size, longer) if width <= height else (longer, size)
    return image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)


def crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre [size, size, 3] with offsets rounded down."""
    width, height = image.size
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
