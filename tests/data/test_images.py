"""Bytes → pixels: the transform's arithmetic, odd modes, and reasons for what cannot be read."""

import io
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchsae_ray.data import images
from patchsae_ray.data.images import FORMATS, BadImage, decode
from patchsae_ray.data.scans import IMAGE_EXTENSIONS


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
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 63)
    with pytest.raises(BadImage, match="too many pixels: 64 x 64, at most 4,032 are read"):
        decode(whole, 32)


def strip(width: int, height: int) -> bytes:
    """A PNG of a grey strip, of about a hundred bytes however long it is."""
    return encoded(Image.new("L", (width, height), 128), optimize=True)


def test_a_strip_is_read_up_to_a_bound_on_what_it_is_resized_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for width, height in [(1, 8_000), (8_000, 1), (1, 100_000)]:
        with pytest.raises(BadImage, match=rf"too long for its width: {width:,} x {height:,} would be resized to .*33,554,432"):
            decode(strip(width, height), 224)
    assert (decode(strip(2, 1_300), 224) == 128).all()
    monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", 32 * 64)
    assert decode(strip(10, 20), 32).shape == (32, 32, 3)
    with pytest.raises(BadImage, match=r"resized to 32 x 67 pixels"):
        decode(strip(10, 21), 32)


def test_the_formats_are_those_of_the_extensions_that_are_listed() -> None:
    Image.init()
    assert {Image.EXTENSION[extension] for extension in IMAGE_EXTENSIONS} == set(FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_each_format(form: str) -> None:
    bars = np.zeros((32, 40, 3), np.uint8) + (np.arange(40, dtype=np.uint8) // 8 * 50)[None, :, None]
    exactly = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    found = decode(encoded(Image.fromarray(bars), form, **exactly.get(form, {})), 32)
    assert np.abs(found.astype(int) - bars[:, 4:36]).max() <= (2 if form == "JPEG" else 0)


def test_a_camera_s_multi_picture_jpeg_is_read_as_its_first() -> None:
    data = encoded(
        Image.new("RGB", (32, 32), (250, 250, 250)), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))]
    )
    assert (decode(data, 32) == 250).all()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(written) (w) file closefile\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("data", [EPS, encoded(gradient(32, 32), "ICO"), encoded(gradient(32, 32), "PCX")])
def test_other_formats_are_not_tried(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    with pytest.raises(BadImage, match=r"not an image of a known format \(BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP\)"):
        decode(data, 32)


def test_no_memory_is_not_the_image_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "resize", no_memory)
    with pytest.raises(MemoryError):
        decode(encoded(gradient(32, 40)), 32)


HOSTILE = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from patchsae_ray.data.images import FORMATS, BadImage, decode
from patchsae_ray.data.scans import IMAGE_EXTENSIONS

def reason(path):
    try:
        return str(decode(Path(path).read_bytes(), 224).shape)
    except BadImage as error:
        return str(error)

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reason(sys.argv[1])
usual = peak()
with ThreadPoolExecutor(4) as pool:
    for found in pool.map(reason, sys.argv[1:] * 4):
        print(found)
print((peak() - usual) // (1 if sys.platform == "darwin" else 1024))
"""


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    data = bytearray(strip(1, 1))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_hostile_images_are_named_and_take_no_memory_in_any_thread(tmp_path: Path) -> None:
    paletted = encoded(gradient(64, 64).convert("P"), transparency=bytes(range(256)))  # Pillow warns of these
    hostile = {
        "good.png": (encoded(gradient(640, 480)), r"\(224, 224, 3\)"),
        "palette.png": (paletted, r"\(224, 224, 3\)"),
        "narrow.png": (strip(1, 8_000), "too long for its width"),
        "narrower.png": (strip(1, 100_000), "too long for its width"),
        "large.png": (encoded(Image.new("1", (9_000, 10_000))), "too many pixels: 9,000 x 10,000"),
        "huge.png": (header_only(60_000, 60_000), "too many pixels: at most 89,478,485 are read"),
        "program.png": (EPS, "not an image of a known format"),
        "program.eps": (EPS, "not an image of a known format"),
    }
    for name, (data, _) in hostile.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", HOSTILE, *(str(tmp_path / name) for name in hostile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "", "nothing of Pillow's reaches the terminal"
    *reasons, grown = done.stdout.splitlines()
    assert len(reasons) == 4 * len(hostile)
    for found, (_, wanted) in zip(reasons, [*hostile.values()] * 4, strict=True):
        assert re.match(wanted, found), found
    assert int(grown) < 300, f"{grown} MiB above the usual"


def large_canvas(width: int, height: int) -> bytes:
    """A WebP of a 16 x 16 frame on a canvas that is as large as it claims."""
    data = bytearray(encoded(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), "WEBP", lossless=True))
    body = data[12:]
    chunk = b"VP8X" + (10).to_bytes(4, "little") + b"\x10\0\0\0"
    chunk += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = (0).to_bytes(6, "little") + (15).to_bytes(3, "little") * 2 + (0).to_bytes(4, "little")
    chunk = chunk.replace(b"\x10\0\0\0", b"\x12\0\0\0", 1) + b"ANIM" + (6).to_bytes(4, "little") + bytes(6)
    chunk += b"ANMF" + (len(frame) + len(body)).to_bytes(4, "little") + frame + body
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


LARGE = """
import resource, sys
from pathlib import Path
from patchsae_ray.data.images import BadImage, decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 1024)
decode(Path(sys.argv[1]).read_bytes(), 224)
data, usual = Path(sys.argv[2]).read_bytes(), peak()
try:
    print(decode(data, 224).shape)
except BadImage as error:
    print(error)
print(peak() - usual)
"""


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("webp", "too large: 9,400 x 9,400 pixels of WEBP"),
        ("grey16", r"\(224, 224, 3\)"),
        ("alpha", "too large: 9,400 x 9,400 pixels of PNG in mode RGBA"),
    ],
)
def test_a_small_file_takes_no_more_memory_than_a_large_photo(form: str, reason: str, tmp_path: Path) -> None:
    make = {
        "webp": lambda: large_canvas(9_400, 9_400),
        "grey16": lambda: encoded(Image.new("I;16", (9_400, 9_400), 0x8080), compress_level=1),
        "alpha": lambda: encoded(Image.new("RGBA", (9_400, 9_400)), compress_level=1),
    }
    (tmp_path / "usual.png").write_bytes(encoded(gradient(640, 480)))
    (tmp_path / "large").write_bytes(make[form]())
    command = [sys.executable, "-c", LARGE, str(tmp_path / "usual.png"), str(tmp_path / "large")]
    said, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.match(reason, said), said
    assert int(grown) < 300, f"{grown} MiB above the usual"


def test_a_large_photo_of_eight_bits_is_within_the_bound() -> None:
    for mode in ("L", "RGB"):
        for form in ("JPEG", "PNG"):
            image = Image.open(io.BytesIO(encoded(Image.new(mode, (8, 8)), form)))
            image._size = (10_900, 8_200)
            images._check_size(image, 224)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P"])
def test_converting_after_resizing_changes_nothing(mode: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 4), dtype=np.uint8), "RGBA")
    image = noise if mode == "RGBA" else noise.convert("RGB").convert("L" if mode == "LA" else mode)
    if mode == "LA":
        image.putalpha(noise.getchannel("A"))
    wanted = image.convert("RGB").resize((32, 41), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(images.rgb_resized(image, 32)), np.asarray(wanted))
