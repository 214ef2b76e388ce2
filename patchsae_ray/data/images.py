"""Bytes → pixels, as Hugging Face's CLIP processor makes them; an unreadable image is a reason, not a crash."""

import io
import logging
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, ROWSPERSTRIP, TILELENGTH, TILEWIDTH

from patchsae_ray.errors import first_line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. Others are not tried: EPS, for one, is a program that Ghostscript runs."""
MAX_PIXELS = 89_478_485
"""Of an image as it is stored. Pillow itself warns from here on."""
MAX_RESIZED_PIXELS = 2**25
"""Of an image before it is cropped, in four bytes each: 128 MiB. A strip of 1 x 8,000 would be 224 x 1,792,000."""
MAX_BYTES = 384 * 2**20
"""That decoding and resizing may take, as `_needed` estimates it: MAX_PIXELS of RGB are 341 MiB of it."""

_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""That Pillow keeps a pixel of a mode in; four in all others."""
_CONVERTED_BYTES = {"RGB": 0, "L": 0, "1": 1, "LA": 1, "RGBA": 1, "I": 1, "I;16": 1, "I;16B": 1, "I;16L": 1}
"""That a pixel of a mode takes besides while `rgb_resized` works; four in all others, which become RGB as a whole."""
_DECODER_BYTES = {"WEBP": 12, "BMP": 1}
"""That a format's decoder holds a pixel, where it holds the image besides: libwebp two canvases and a copy in RGBA."""
_ROWS_AT_ONCE = 256

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
            _check_size(opened, size)
            opened.load()
            return crop(rgb_resized(opened, size), size)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:  # Pillow's own check, at twice the bound, comes before ours
        raise BadImage(f"too many pixels: at most {MAX_PIXELS:,} are read") from error
    except Exception as error:  # a damaged file makes its decoder raise anything; the image is at fault in each case
        raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error


def _check_size(image: Image.Image, size: int) -> None:
    """See that neither the stored image, nor the resized one, nor what they take to be made is more than what is read.

    Raises: BadImage with the limit.
    """
    width, height = image.size
    if not width or not height:
        raise BadImage(f"no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"too many pixels: {width:,} x {height:,}, at most {MAX_PIXELS:,} are read")
    wide, high = resized(image.size, size)
    if wide * high > MAX_RESIZED_PIXELS:
        raise BadImage(
            f"too long for its width: {width:,} x {height:,} would be resized to {wide:,} x {high:,} pixels, "
            f"at most {MAX_RESIZED_PIXELS:,} are made"
        )
    if (needed := _needed(image, size)) > MAX_BYTES:
        raise BadImage(
            f"too large: {width:,} x {height:,} pixels of {image.format} in mode {image.mode} take {needed >> 20} MiB "
            f"to decode, at most {MAX_BYTES >> 20} are taken"
        )


def _needed(image: Image.Image, size: int) -> int:
    """Bytes, estimated, that an image which is opened takes until it is resized."""
    width, height = image.size
    a_pixel = _STORED_BYTES.get(image.mode, 4) + _CONVERTED_BYTES.get(image.mode, 4) + _DECODER_BYTES.get(image.format or "", 0)
    wide, high = resized(image.size, size)
    return width * height * a_pixel + _strip_bytes(image) + 4 * wide * (height + high)  # Pillow resizes the rows first


def _strip_bytes(image: Image.Image) -> int:
    """Of the strip or tile that a TIFF's decoder holds; 0 for other formats."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return 0
    width, height = image.size
    bits = sum(tags.get(BITSPERSAMPLE, (8,)))
    pixels = tags[TILEWIDTH] * tags[TILELENGTH] if TILEWIDTH in tags else width * min(height, tags.get(ROWSPERSTRIP, height))
    return int(pixels * bits) // 8


def rgb_resized(image: Image.Image, size: int) -> Image.Image:
    """Any mode as RGB, the shorter side to `size`; grey and alpha never take a second image of four bytes a pixel.

    Bands are resized apart from each other, so that the order of resizing and converting them makes no difference. 16-bit
    greys are scaled to 8 bits, where PIL's own conversion would clip them.
    """
    mode = image.mode
    if mode == "RGBA":
        return Image.merge("RGB", [resize(image.getchannel(band), size) for band in "RGB"])
    if mode == "LA":
        image = image.getchannel("L")
    elif mode == "1":
        image = image.convert("L")
    elif mode.startswith("I"):
        image = _eight_bits(image)
    elif mode not in ("L", "RGB"):
        image = image.convert("RGB")
    small = resize(image, size)
    return small if small.mode == "RGB" else small.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey of 16 or 32 bits as one of 8: 65,535 becomes 255."""
    width, height = image.size
    made = Image.new("L", image.size)
    for top in range(0, height, _ROWS_AT_ONCE):
        grey = np.array(image.crop((0, top, width, min(height, top + _ROWS_AT_ONCE))))
        np.clip(grey, 0, 65535, out=grey)
        grey //= 257
        made.paste(Image.fromarray(grey.astype(np.uint8)), (0, top))
    return made


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
