"""Bytes → pixels: the transform's arithmetic, odd modes, and reasons for what cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from patchsae_ray.data import images
from patchsae_ray.data.images import BadImage, decode


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns % 256, rows % 256, (rows + columns) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(32, 32), (40, 32), (33, 32), (32, 41), (35, 32)])
def test_the_crop_rounds_down(width: int, height: int) -> None:
    image = gradient(width, height)
    top, left = (height - 32) // 2, (width - 32) // 2
    assert np.array_equal(decode(encoded(image), 32), np.asarray(image)[top : top + 32, left : left + 32])


@pytest.mark.parametrize(
    ("width", "height", "resized"), [(100, 75, (42, 32)), (75, 100, (32, 42)), (301, 100, (96, 32)), (10, 10, (32, 32))]
)
def test_the_longer_side_is_cut_off(width: int, height: int, resized: tuple[int, int]) -> None:
    image = gradient(width, height)
    wanted = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - 32) // 2, (resized[1] - 32) // 2
    assert np.array_equal(decode(encoded(image), 32), np.asarray(wanted)[top : top + 32, left : left + 32])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_modes(mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    image = gradient(32, 32).convert("RGB").convert("L" if mode == "LA" else mode)
    image = image.convert("LA") if mode == "LA" else image
    assert np.array_equal(decode(encoded(image, form), 32), np.asarray(image.convert("RGB")))


def test_sixteen_bit_greys_are_scaled() -> None:
    image = Image.fromarray(np.full((32, 32), 0x8080, dtype=np.uint16))
    assert (decode(encoded(image), 32) == 0x80).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, 32)[0, 0].tolist() == [250, 0, 0]


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(gradient(64, 64))
    for data, reason in [
        (b"", "empty file"),
        (b"hello world", "not an image"),
        (whole[: len(whole) // 2], "truncated"),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode(data, 32)
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="too many pixels"):
        decode(whole, 32)
