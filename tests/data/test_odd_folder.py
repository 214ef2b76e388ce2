"""A folder of everything that turns up in real ones: each file is read right, or recorded with its reason."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from patchsae_ray.data.sources import build_manifest
from patchsae_ray.data.units import decode_unit
from tests.data.makers import picture


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_each_is_read_or_recorded(tmp_path: Path) -> None:
    red = Image.new("RGB", (40, 40), (250, 10, 10))
    files = {
        "animated.gif": encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40), (0, 0, 250))]),
        "bomb.png": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "empty.jpg": b"",
        "good.png": encoded(red, "PNG"),
        "letter.png": b"Dear Sir or Madam",
        "sixteen.png": encoded(Image.fromarray(np.full((40, 40), 0x8080, np.uint16)), "PNG"),
        "truncated.png": picture(1)[:200],
        "notes.txt": b"not an image by its name",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    manifest = build_manifest(str(tmp_path))
    assert (manifest.num_images, manifest.ignored_files) == (8, 1)
    unit = decode_unit(manifest.units[0], manifest.reading, 32)
    assert unit.positions.tolist() == [0, 2, 4, 6]
    means = unit.pixels.mean(axis=(1, 2))
    for row in (0, 1, 2):
        assert np.abs(means[row] - [250, 10, 10]).max() < 8
    assert means[3].tolist() == [128, 128, 128]
    reasons = {path: reason for _, path, reason in unit.bad}
    assert set(reasons) == {"bomb.png", "empty.jpg", "letter.png", "truncated.png"}
    assert reasons["bomb.png"].startswith("too many pixels")
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["letter.png"].startswith("not an image of a known format")
    assert len(reasons["truncated.png"]) > 5
