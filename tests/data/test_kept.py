"""Manifests are made once, and again where the source has changed."""

import os
from pathlib import Path

import pytest

from patchsae_ray.data import kept, sources
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from tests.data.makers import make_folder, parquet_bytes, picture, write


def opened(path: Path, root: Path, relist: bool = False) -> Manifest:
    return keep(open_dataset("mine", str(path), None, None, str(root), relist))


def settle(path: Path) -> None:
    for folder in [path, *(one for one in path.rglob("*") if one.is_dir())]:
        os.utime(folder, (10**9, 10**9))


def test_a_folder_is_listed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(str(tmp_path / "data"), 9)
    settle(tmp_path / "data")
    first = opened(tmp_path / "data", tmp_path / "root")
    listings: list[object] = []
    listed = sources.list_source
    monkeypatch.setattr(kept, "list_source", lambda *given: (listings.append(given), listed(*given))[1])
    again = opened(tmp_path / "data", tmp_path / "root")
    assert not listings
    assert again.digest == first.digest
    assert (again.classnames, again.num_images, again.reading) == (first.classnames, 9, first.reading)
    assert list(again.units) == list(first.units)
    write(str(tmp_path / "data" / "cat" / "99999.png"), picture(99))
    assert opened(tmp_path / "data", tmp_path / "root").num_images == 10
    assert len(listings) == 1


def test_a_folder_that_is_being_written_is_not_trusted(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "data"), 3)
    opened(tmp_path / "data", tmp_path / "root")
    assert not list((tmp_path / "root" / "out" / "manifests").glob("*.json"))


def test_parquet_files_show_a_change_by_their_list(tmp_path: Path) -> None:
    write(str(tmp_path / "data" / "a.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    assert opened(tmp_path / "data", tmp_path / "root").num_images == 3
    write(str(tmp_path / "data" / "b.parquet"), parquet_bytes([3, 4], [0, 1]))
    assert opened(tmp_path / "data", tmp_path / "root").num_images == 5


def test_relist_and_a_damaged_file(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "data"), 6)
    settle(tmp_path / "data")
    opened(tmp_path / "data", tmp_path / "root")
    (arrow,) = (tmp_path / "root" / "out" / "manifests").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"is not a whole manifest; --relist would make it again"):
        opened(tmp_path / "data", tmp_path / "root")
    assert opened(tmp_path / "data", tmp_path / "root", relist=True).num_images == 6
    assert arrow.read_bytes() == whole


def test_row_groups_are_kept_too(tmp_path: Path) -> None:
    write(f"{tmp_path}/data/rows.parquet", parquet_bytes(list(range(30)), None, row_group_size=7))
    for manifest in (opened(tmp_path / "data", tmp_path / "root"), opened(tmp_path / "data", tmp_path / "root")):
        assert manifest.group_edges().tolist() == [0, 7, 14, 21, 28, 30]
        assert manifest.units.edges().tolist() == [0, 30]


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"format": 2}',
        b'{"format": 2, "sign": {"kind": "files", "value": "", "more": 1}, "manifest": "a.arrow", "created": ""}',
        b'{"format": 2, "sign": {"kind": "directories", "value": ""}, "manifest": "a.arrow", "created": ""}',
    ],
)
def test_a_damaged_note_is_made_again(tmp_path: Path, note: bytes, caplog: pytest.LogCaptureFixture) -> None:
    write(str(tmp_path / "data" / "a.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    opened(tmp_path / "data", tmp_path / "root")
    (file,) = (tmp_path / "root" / "out" / "manifests").glob("*.json")
    file.write_bytes(note)
    assert opened(tmp_path / "data", tmp_path / "root").num_images == 3
    assert f"{file}, which tells of the kept one, is damaged; it is made again" in caplog.text
    assert b'"manifest": ' in file.read_bytes()


@pytest.mark.parametrize("gone", ["*.arrow", "parts/*.part", "parts/*.labels"])
def test_a_note_whose_files_are_gone_is_made_again(tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture) -> None:
    write(str(tmp_path / "data" / "a.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    opened(tmp_path / "data", tmp_path / "root")
    (file,) = (tmp_path / "root" / "out" / "manifests").glob(gone)
    file.unlink()
    again = opened(tmp_path / "data", tmp_path / "root")
    assert again.units.labels().tolist() == [0, 1, 2]
    assert again.units.read(0).count == 3
    assert f"the kept one is not whole (no such file: {file}); it is made again" in caplog.text
    assert file.exists()


def test_a_manifest_that_lacks_a_field_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path / "data" / "a.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    monkeypatch.setattr(kept, "_PLAIN_FIELDS", ["source"])
    opened(tmp_path / "data", tmp_path / "root")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"is not a whole manifest; --relist would make it again"):
        opened(tmp_path / "data", tmp_path / "root")
