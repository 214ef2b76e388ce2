"""A folder of everything that turns up in real ones: each file is read right, or recorded with its reason."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchsae_ray.data.sources import build_manifest
from patchsae_ray.data.units import decode_unit
from patchsae_ray.errors import UserError
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
    assert reasons["letter.png"].startswith("not an image of a known format (BMP, ")
    assert len(reasons["truncated.png"]) > 5


def test_links_to_folders_are_classes_wherever_they_are(tmp_path: Path) -> None:
    for name in ("elsewhere/bee/2.png", "data/train/ant/1.png", "data/test/ant/9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(int(name[-5])))
    (tmp_path / "data" / "train" / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    for manifest in (build_manifest(str(tmp_path / "data"), "train"), build_manifest(str(tmp_path / "data" / "train"))):
        assert manifest.classnames == ("ant", "bee")
        assert decode_unit(manifest.units[0], manifest.reading, 8).labels.tolist() == [0, 1]
    assert build_manifest(str(tmp_path / "data")).num_images == 3


def test_a_link_back_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(picture(1))
    (root / "loop").symlink_to(root)
    (root / "bee" / "up").symlink_to(root)
    (root / "bee" / "nowhere.png").symlink_to(root / "gone.png")
    manifest = build_manifest(str(root))
    assert manifest.classnames == ("ant", "bee")
    unit = decode_unit(manifest.units[0], manifest.reading, 8)
    assert unit.positions.tolist() == [0, 1]
    assert [path for _, path, _ in unit.bad] == ["bee/nowhere.png"]
    assert unit.bad[0][2].startswith("no such file")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "images" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(picture(1))
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"letter")
    manifest = build_manifest(str(tmp_path / "images"))
    assert manifest.classnames == ("caf\\xe9",)
    unit = decode_unit(manifest.units[0], manifest.reading, 8)
    assert unit.positions.tolist() == [0]
    assert [path for _, path, _ in unit.bad] == ["caf\\xe9/\\xff.png"]
    "".join([*manifest.classnames, unit.bad[0][2], manifest.paths(manifest.units[0])[1]]).encode()


def test_pipes_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    os.mkfifo(tmp_path / "2.png")
    assert build_manifest(str(tmp_path)).num_images == 1


def test_files_beside_folders_are_in_their_place(tmp_path: Path) -> None:
    names = ["all/a-b/x.png", "all/a.png", "all/a/1.png", "all/b.png", "all/b/2.png"]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(index))
    manifest = build_manifest(str(tmp_path))
    assert manifest.paths(manifest.units[0]) == names
    assert manifest.classnames == ("all",)


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(1))
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "bee" / "self").symlink_to("self")
    assert build_manifest(str(tmp_path)).num_images == 2


def test_a_thousand_folders_in_each_other(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.png").write_bytes(picture(1))
    folders = [tmp_path / f"bee{'/d' * depth}" for depth in range(1_001)]
    for folder in folders:
        folder.mkdir()
    image = folders[-1] / "2.png"
    image.write_bytes(picture(2))
    try:
        assert build_manifest(str(tmp_path)).num_images == 2
    finally:  # what clears the test's folder goes down by recursion
        image.unlink()
        for folder in reversed(folders):
            folder.rmdir()


def test_a_folder_that_may_not_be_listed_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(1))
    scandir = os.scandir

    def refusing(folder: str) -> object:
        if str(folder).endswith("bee"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr("patchsae_ray.data.listing.os.scandir", refusing)
    with pytest.raises(UserError, match=r"/bee: no permission to list this folder$") as raised:
        build_manifest(str(tmp_path))
    assert type(raised.value) is UserError, "this is not waited for"


def test_an_archive_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").symlink_to("gone")
    with pytest.raises(UserError, match=r"no such file: .*/x\.tar$"):
        build_manifest(str(tmp_path))
