"""Bytes → pixels, as Hugging Face's CLIP processor makes them; an unreadable image is a reason, not a crash."""

import io
import logging
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchsae_ray.errors import first_line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. Others are not tried: EPS, for one, is a program that Ghostscript runs."""
MAX_PIXELS = 89_478_485
"""Of an image as it is stored, which Pillow keeps in four bytes each: 341 MiB. Pillow itself warns from here on."""
MAX_RESIZED_PIXELS = 2**25
"""Of an image before it is cropped, in four bytes each: 128 MiB. A strip of 1 x 8,000 would be 224 x 1,792,000."""

# Pillow warns of palettes and damaged metadata; what matters of an image is its pixels or the reason why there are none.
# Once for the process: `warnings.catch_warnings` changes the filters of all threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class BadImage(Exception):
    """The bytes are no image that can be read; the message is the reason, in one line."""


def decode(data: bytes, size: int) -> np.ndarray:
    """Image bytes → uint8 [size, size, 3].

    RGB; the shorter side to `size`, the longer to int(size * long / short), bicubic on uint8; the crop begins at
    ((h - size) // 2, (w - size) // 2), rounded down. Of an animation the first frame.

    Raises: BadImage with the reason; MemoryError where this machine has too little for an image within the bounds.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_size(opened.size, size)
            opened.load()
            return crop(resize(to_rgb(opened), size), size)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:  # Pillow's own check, at twice the bound, comes before ours
        raise BadImage(f"too many pixels: at most {MAX_PIXELS:,} are read") from error
    except Exception as error:  # a damaged file makes its decoder raise anything; the image is at fault in each case
        raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error


def _check_size(stored: tuple[int, int], size: int) -> None:
    """See that neither the stored image nor the resized one is larger than what is read.

    Raises: BadImage with the limit.
    """
    width, height = stored
    if not width or not height:
        raise BadImage(f"no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"too many pixels: {width:,} x {height:,}, at most {MAX_PIXELS:,} are read")
    wide, high = resized(stored, size)
    if wide * high > MAX_RESIZED_PIXELS:
        raise BadImage(
            f"too long for its width: {width:,} x {height:,} would be resized to {wide:,} x {high:,} pixels, "
            f"at most {MAX_RESIZED_PIXELS:,} are made"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; 16-bit greys are scaled to 8 bits, where PIL's own conversion would clip them."""
    if image.mode.startswith("I"):
        grey = np.array(image)
        np.clip(grey, 0, 65535, out=grey)
        grey //= 257
        image = Image.fromarray(grey.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def resized(stored: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of an image once its shorter side is `size`."""
    width, height = stored
    longer = int(size * max(width, height) / min(width, height))
    return (size, longer) if width <= height else (longer, size)


def resize(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size`, bicubic."""
    new = resized(image.size, size)
    return image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)


def crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre [size, size, 3] with offsets rounded down."""
    width, height = image.size
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
