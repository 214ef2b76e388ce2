"""Each form of data set: canonical order, labels, splits, and units that read back just their images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray.data.images import decode
from patchsae_ray.data.manifest import UNIT_SIZE, Manifest, Segment, cut_units
from patchsae_ray.data.sources import build_manifest
from patchsae_ray.data.units import decode_unit, read_image, read_unit
from patchsae_ray.errors import UserError
from tests.data.makers import CLASSES, make_folder, parquet_bytes, picture, tar_bytes, write


def labels_of(count: int) -> list[int]:
    return [number * 3 // count for number in range(count)]


def contents(manifest: Manifest) -> list[tuple[bytes, int]]:
    return [(raw.data, raw.label) for unit in manifest.units for raw in read_unit(unit, manifest.reading)]


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "data") if request.param == "local" else f"memory://{tmp_path.name}-{request.node.name[:20]}"


def test_folder(root: str) -> None:
    make_folder(root, 9)
    write(f"{root}/ant/notes.txt", b"not an image")
    manifest = build_manifest(root)
    assert manifest.classnames == tuple(CLASSES)
    assert manifest.num_images == 9
    assert manifest.ignored_files == 1
    assert contents(manifest) == [(picture(number), label) for number, label in enumerate(labels_of(9))]


def test_flat_folder_has_no_labels(root: str) -> None:
    for number in range(3):
        write(f"{root}/{number}.png", picture(number))
    manifest = build_manifest(root)
    assert not manifest.labelled
    assert [label for _, label in contents(manifest)] == [-1, -1, -1]


def test_parquet_files_make_one_order(root: str) -> None:
    labels: list[object] = list(labels_of(1000))
    write(f"{root}/train-00000-of-00002.parquet", parquet_bytes(list(range(700)), labels[:700], row_group_size=300))
    write(f"{root}/train-00001-of-00002.parquet", parquet_bytes(list(range(700, 1000)), labels[700:], row_group_size=90))
    write(f"{root}/test-00000-of-00001.parquet", parquet_bytes([5], [2]))
    manifest = build_manifest(root, split="train")
    assert [unit.count for unit in manifest.units] == [512, 488]
    assert [unit.start for unit in manifest.units] == [0, 512]
    assert len(manifest.units[1].segments) == 2
    assert manifest.classnames == tuple(CLASSES)
    assert contents(manifest) == [(picture(number), labels[number]) for number in range(1000)]
    assert build_manifest(root, split="test").num_images == 1
    assert build_manifest(f"{root}/train-*.parquet").digest == manifest.digest
    assert build_manifest(f"{root}/test-00000-of-00001.parquet").num_images == 1


def test_parquet_with_string_labels_and_without(root: str) -> None:
    write(f"{root}/a.parquet", parquet_bytes([0, 1, 2], ["wasp", "ant", "wasp"], names=False))
    manifest = build_manifest(f"{root}/a.parquet")
    assert manifest.classnames == ("ant", "wasp")
    assert [label for _, label in contents(manifest)] == [1, 0, 1]
    write(f"{root}/b.parquet", parquet_bytes([0, 1], None))
    assert not build_manifest(f"{root}/b.parquet").labelled
    write(f"{root}/c.parquet", parquet_bytes([0, 1], [4, 0], names=False))
    numbered = build_manifest(f"{root}/c.parquet")
    assert (numbered.num_classes, numbered.classnames) == (5, ())


@pytest.mark.parametrize("long_names", [False, True])
def test_tars_are_read_by_byte_range(root: str, long_names: bool) -> None:
    labels = labels_of(600)
    write(f"{root}/test/0.tar", tar_bytes(list(range(550)), labels[:550], long_names))
    write(f"{root}/test/1.tar", tar_bytes(list(range(550, 600)), labels[550:], long_names))
    write(f"{root}/classnames.txt", b"ant\nbee\ncat\n")
    manifest = build_manifest(root, split="test")
    assert [unit.count for unit in manifest.units] == [512, 38, 50]
    assert [unit.start for unit in manifest.units] == [0, 512, 550]
    assert manifest.classnames == tuple(CLASSES)
    assert contents(manifest) == [(picture(number), labels[number]) for number in range(600)]


def test_tar_without_labels(root: str) -> None:
    write(f"{root}/0.tar", tar_bytes([3, 4], None))
    manifest = build_manifest(f"{root}/0.tar")
    assert not manifest.labelled
    assert contents(manifest) == [(picture(3), -1), (picture(4), -1)]


def test_the_digest_knows_what_is_inside(tmp_path: Path) -> None:
    digests = set()
    for index, (numbers, labels) in enumerate([([1, 2], [0, 1]), ([1, 3], [0, 1]), ([1, 2], [1, 0])]):
        write(str(tmp_path / f"p{index}" / "a.parquet"), parquet_bytes(numbers, list(labels)))
        write(str(tmp_path / f"t{index}" / "a.tar"), tar_bytes(numbers, labels))
        digests |= {build_manifest(str(tmp_path / f"{form}{index}")).digest for form in "pt"}
    assert len(digests) == 6


def test_one_image_by_its_position(root: str) -> None:
    make_folder(f"{root}/folder", 9)
    write(f"{root}/rows/a.parquet", parquet_bytes(list(range(5)), [0, 0, 1, 1, 2]))
    write(f"{root}/rows/b.parquet", parquet_bytes(list(range(5, 9)), [0, 0, 1, 1]))
    write(f"{root}/tars/a.tar", tar_bytes(list(range(9)), labels_of(9)))
    for form in ("folder", "rows", "tars"):
        manifest = build_manifest(f"{root}/{form}")
        assert [read_image(manifest, position).data for position in range(9)] == [picture(number) for number in range(9)]
        with pytest.raises(IndexError):
            read_image(manifest, 9)


def test_a_relative_path_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path / "train-0.parquet"), parquet_bytes([0, 1], [0, 1]))
    monkeypatch.chdir(tmp_path)
    for uri in ("train-0.parquet", "train-*.parquet", "."):
        manifest = build_manifest(uri)
        assert manifest.units[0].segments[0].uri == str(tmp_path / "train-0.parquet")


def test_the_digest_knows_the_data_and_not_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_folder(str(tmp_path / name), 6)
    first, second = build_manifest(str(tmp_path / "one")), build_manifest(str(tmp_path / "two"))
    assert first.digest == second.digest
    write(str(tmp_path / "two" / "cat" / "99999.png"), picture(99))
    assert build_manifest(str(tmp_path / "two")).digest != first.digest


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 1500), min_size=1, max_size=6))
def test_units_cover_each_row_once(counts: list[int]) -> None:
    units = cut_units([Segment(f"file{index}", count) for index, count in enumerate(counts)])
    rows = [(s.uri, s.first + i) for unit in units for s in unit.segments for i in range(s.count)]
    assert rows == [(f"file{index}", row) for index, count in enumerate(counts) for row in range(count)]
    assert all(unit.count == UNIT_SIZE for unit in units[:-1])
    assert [unit.start for unit in units] == [UNIT_SIZE * index for index in range(len(units))]


def test_bad_images_keep_their_positions(root: str) -> None:
    make_folder(root, 6)
    write(f"{root}/ant/00001.png", picture(1)[:60])
    write(f"{root}/bee/00002.png", b"")
    write(f"{root}/cat/00005.png", b"GIF? no")
    manifest = build_manifest(root)
    unit = decode_unit(manifest.units[0], manifest.reading, 8)
    assert unit.positions.tolist() == [0, 3, 4]
    assert unit.labels.tolist() == [0, 1, 2]
    assert unit.pixels.shape == (3, 8, 8, 3)
    assert np.array_equal(unit.pixels[1], decode(picture(3), 8))
    assert [(position, path) for position, path, _ in unit.bad] == [
        (1, "ant/00001.png"),
        (2, "bee/00002.png"),
        (5, "cat/00005.png"),
    ]
    assert unit.bad[1][2] == "empty file"
    assert unit.bad[2][2].startswith("not an image of a known format (BMP, ")


def test_a_source_that_changed_is_said(tmp_path: Path) -> None:
    write(str(tmp_path / "a.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    manifest = build_manifest(str(tmp_path / "a.parquet"))
    longer = dataclasses.replace(manifest.units[0], segments=(Segment(str(tmp_path / "a.parquet"), 5),))
    with pytest.raises(UserError, match="changed while it was read"):
        decode_unit(longer, manifest.reading, 8)


def test_wrong_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(str(tmp_path / "texts" / "readme.txt"), b"hello")
    write(str(tmp_path / "mixed" / "a" / "1.png"), picture(1))
    write(str(tmp_path / "mixed" / "2.png"), picture(2))
    write(str(tmp_path / "cut" / "a.parquet"), parquet_bytes([0, 1], [0, 1])[:100])
    write(str(tmp_path / "cut-tar" / "a.tar"), b"x" * 2000)
    write(str(tmp_path / "good" / "train-0.parquet"), parquet_bytes([0, 1], [0, 1]))
    cases = {
        ("empty", None): "no images in",
        ("texts", None): "no images in",
        ("nowhere", None): "is not there",
        ("mixed", None): "images beside class folders",
        ("cut", None): "not a whole Parquet file",
        ("cut-tar", None): "not a whole tar",
        ("good", "trian"): "did you mean 'train'",
    }
    for (name, split), message in cases.items():
        with pytest.raises(UserError, match=message):
            build_manifest(str(tmp_path / name), split)
    with pytest.raises(UserError, match="has no column 'img'; it has image, label"):
        build_manifest(str(tmp_path / "good"), image_column="img")
    write(str(tmp_path / "uneven" / "a.parquet"), parquet_bytes([0], None))
    write(str(tmp_path / "uneven" / "b.parquet"), parquet_bytes([0], [1]))
    with pytest.raises(UserError, match=r"b\.parquet has a column 'label', other files of it differ"):
        build_manifest(str(tmp_path / "uneven"))
    with pytest.raises(UserError, match="cannot open nope://x"):
        build_manifest("nope://x")
