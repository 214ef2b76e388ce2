"""Each form of data set: canonical order, labels, splits, and units that read back just their images."""

import dataclasses
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray import storage
from patchsae_ray.data.images import decode
from patchsae_ray.data.manifest import UNIT_SIZE, Manifest, row_group_edges
from patchsae_ray.data.sources import build_manifest
from patchsae_ray.data.units import decode_images, decode_unit, read_image, read_unit
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
    assert [unit.count for unit in manifest.units] == [300, 490, 210], "row groups of 300, 300, 100, 90, 90, 90 and 30"
    assert [unit.start for unit in manifest.units] == [0, 300, 790]
    assert len(manifest.units[1].images.column("uri").unique()) == 2
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


def test_digests_are_those_of_earlier_versions(tmp_path: Path) -> None:
    names = ["ant/b.png", "ant/a.jpg", "a-b/x.png", "été/1.png", 'ant/q"uo.png', "ant/notes.txt", "ant/deep/er.png"]
    for index, name in enumerate(names):
        write(str(tmp_path / "folder" / name), b"x" * (index + 1))
    folder = build_manifest(str(tmp_path / "folder"))
    assert (folder.digest, folder.classnames) == ("0ff272f1fa0fb5d0050eeaea0e4336aa", ("a-b", "ant", "été"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        members = {"s0.png": "abc", "s0.cls": "1", "s1.cls": "0", "s1.jpg": "defg", "s1.png": "zz", "s2.json": "{}"}
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data.encode()))
    assert build_manifest(str(tmp_path / "a.tar")).digest == "2493cbc9af0fad73585ede7214862065"


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


@pytest.fixture(params=["folder", "rows", "tars"])
def nine(root: str, request: pytest.FixtureRequest) -> Manifest:
    """Images 0 to 8 in three classes, the fifth of them unreadable."""
    labels: list[object] = list(labels_of(9))
    if request.param == "folder":
        make_folder(f"{root}/folder", 9)
        write(f"{root}/folder/bee/00005.png", b"letter")
    elif request.param == "rows":
        write(f"{root}/rows/a.parquet", parquet_bytes(list(range(4)), labels[:4], row_group_size=3, bad=(5,)))
        write(f"{root}/rows/b.parquet", parquet_bytes(list(range(4, 9)), labels[4:], row_group_size=2, bad=(5,)))
    else:
        write(f"{root}/tars/a.tar", tar_bytes(list(range(4)), labels_of(9)[:4], bad=(5,)))
        write(f"{root}/tars/b.tar", tar_bytes(list(range(4, 9)), labels_of(9)[4:], bad=(5,)))
    return build_manifest(f"{root}/{request.param}")


def test_images_at_any_positions(nine: Manifest) -> None:
    wanted = np.array([7, 0, 5, 3, 8, 0])
    found = decode_images(nine, wanted, 8)
    assert found.index == -1
    assert found.positions.tolist() == [7, 0, 3, 8, 0]
    assert found.labels.tolist() == [labels_of(9)[position] for position in found.positions]
    assert np.array_equal(found.pixels, np.stack([decode(picture(position), 8) for position in found.positions.tolist()]))
    ((position, path, reason),) = found.bad
    assert (position, path[-9:]) == (5, "00005.png")
    assert reason.startswith("not an image of a known format")
    assert decode_images(nine, np.zeros(0, np.int64), 8).pixels.shape == (0, 8, 8, 3)
    with pytest.raises(IndexError):
        decode_images(nine, np.array([0, 9]), 8)
    everything = [decode_unit(unit, nine.reading, 8) for unit in nine.units]
    assert [position for unit in everything for position in unit.positions] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert [row for unit in everything for row in unit.bad] == found.bad


def test_what_a_manifest_says_of_its_images(nine: Manifest) -> None:
    assert nine.label_array().tolist() == labels_of(9)
    assert nine.label_array().dtype == np.int32
    renamed = nine.with_classnames([*reversed(CLASSES), "dog"] if nine.labels_are_names else CLASSES)
    mapped = [CLASSES[::-1].index(CLASSES[label]) for label in labels_of(9)] if nine.labels_are_names else labels_of(9)
    assert renamed.label_array().tolist() == mapped
    assert decode_images(renamed, np.arange(5), 8).labels.tolist() == mapped[:5]
    images = sum(len(picture(number)) for number in range(9) if number != 5) + len(b"letter")
    assert nine.encoded_bytes == images if nine.reading.format != "parquet" else nine.encoded_bytes > images
    assert nine.grain == "image"
    assert dataclasses.replace(nine, encoded_bytes=2**40).grain == ("group" if nine.reading.format == "parquet" else "image")
    assert (
        nine.units_digest != dataclasses.replace(nine, units=nine.units.picked(np.arange(9), np.array([0, 5, 9]))).units_digest
    )


def test_a_row_group_is_read_once_though_many_threads_want_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{root}/a.parquet", parquet_bytes(list(range(40)), None, row_group_size=10))
    manifest = build_manifest(root)
    reads: list[object] = []
    read = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda wanted: (reads.append(wanted), read(wanted))[1])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda position: decode_images(manifest, np.array([position]), 8), list(range(40)) * 3))
    assert [unit.positions[0] for unit in found] == list(range(40)) * 3
    assert len(reads) == 1 + 4, "the footer, and each of four groups"


def test_a_relative_path_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path / "train-0.parquet"), parquet_bytes([0, 1], [0, 1]))
    monkeypatch.chdir(tmp_path)
    for uri in ("train-0.parquet", "train-*.parquet", "."):
        manifest = build_manifest(uri)
        assert manifest.units[0].images.column("uri")[0].as_py() == str(tmp_path / "train-0.parquet")


def test_the_digest_knows_the_data_and_not_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_folder(str(tmp_path / name), 6)
    first, second = build_manifest(str(tmp_path / "one")), build_manifest(str(tmp_path / "two"))
    assert first.digest == second.digest
    write(str(tmp_path / "two" / "cat" / "99999.png"), picture(99))
    assert build_manifest(str(tmp_path / "two")).digest != first.digest


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.integers(0, 3000), max_size=12))
def test_units_are_made_of_whole_row_groups(rows: list[int]) -> None:
    edges, groups = row_group_edges(np.array(rows, np.int64)), np.cumsum([0, *rows])
    assert (edges[0], edges[-1]) == (0, sum(rows))
    assert (np.diff(edges) > 0).all()
    for start, end in pairwise(edges.tolist()):
        inside = groups[(groups > start) & (groups < end)]
        if start in groups and end in groups:
            assert end - start <= UNIT_SIZE or (end - start <= 2 * UNIT_SIZE and not len(inside))
        else:
            assert end - start <= UNIT_SIZE
            assert not len(inside)
            assert rows[int(np.searchsorted(groups, start, side="right")) - 1] > 2 * UNIT_SIZE
    for before, between, after in zip(edges, edges[1:], edges[2:], strict=False):
        if {int(before), int(between), int(after)} <= set(groups.tolist()):
            assert after - before > UNIT_SIZE, "two that would have been one"


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
    whole = parquet_bytes([0, 1, 2], [0, 1, 2])
    write(str(tmp_path / "a.parquet"), whole)
    manifest = build_manifest(str(tmp_path / "a.parquet"))
    write(str(tmp_path / "a.parquet"), bytes(50) + whole)
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file"):
        decode_unit(manifest.units[0], manifest.reading, 8)
    write(str(tmp_path / "a.parquet"), whole[:-50])
    with pytest.raises(UserError, match=r"a\.parquet is cut short"):
        decode_unit(manifest.units[0], manifest.reading, 8)


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
