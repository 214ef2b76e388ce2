"""What is damaged within a Parquet file or a tar is bad images, listed by name; a store that does not answer is not."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsae_ray import storage
from patchsae_ray.data import parquet
from patchsae_ray.data.sources import build_manifest
from patchsae_ray.data.units import DecodedUnit, Raw, decode_images, decode_unit
from patchsae_ray.errors import NotFound, StoreError, UserError
from tests.data.makers import parquet_bytes, picture, tar_bytes, write


def damaged_group(data: bytes, group: int) -> bytes:
    """A Parquet file whose image bytes of one row group are overwritten where a page's header is."""
    column = pq.read_metadata(io.BytesIO(data)).row_group(group).column(0)
    begin = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    return data[:begin] + b"\xff" * 40 + data[begin + 40 :]


def decoded(path: Path) -> list[DecodedUnit]:
    manifest = build_manifest(str(path))
    return [decode_unit(unit, manifest.reading, 8) for unit in manifest.units]


def test_rows_of_a_damaged_page_are_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(damaged_group(parquet_bytes(list(range(30)), [0] * 30, row_group_size=10), 1))
    (unit,) = decoded(file)
    assert unit.positions.tolist() == [*range(10), *range(20, 30)]
    assert [(position, path) for position, path, _ in unit.bad] == [(row, f"{file}#{row}") for row in range(10, 20)]
    assert all(reason.startswith("damaged row group: ") for _, _, reason in unit.bad)


def test_rows_before_a_damaged_page_are_read(tmp_path: Path) -> None:
    rows = parquet_bytes(
        list(range(30)), None, row_group_size=30, data_page_size=2000, write_batch_size=1, use_dictionary=False
    )
    column = pq.read_metadata(io.BytesIO(rows)).row_group(0).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    file = tmp_path / "a.parquet"
    file.write_bytes(rows[:middle] + b"\xff" * 3000 + rows[middle + 3000 :])
    (unit,) = decoded(file)
    assert 5 < len(unit.positions) < 20
    assert unit.positions.tolist() == list(range(len(unit.positions)))
    assert [position for position, _, _ in unit.bad] == list(range(len(unit.positions), 30))


def bomb(rows: int, size: int, kind: pa.DataType, named: bool) -> bytes:
    """Rows of one large value, in a file of a few bytes."""
    images = pa.array([bytes(size)] * rows, kind)
    column = pa.StructArray.from_arrays([images, pa.array(["a.png"] * rows)], ["bytes", "path"]) if named else images
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": column}), buffer, compression="zstd", dictionary_pagesize_limit=2**30)
    return buffer.getvalue()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_a_value_that_many_rows_repeat_is_held_once(
    tmp_path: Path, kind: pa.DataType, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "REPEATED_BYTES", 3 * 2**20)
    file = tmp_path / "a.parquet"
    file.write_bytes(bomb(64, 2**20, kind, named))
    assert file.stat().st_size < 3000
    footer = parquet.read_footer(str(file), file.stat().st_size)
    group = parquet.read_group(footer, 0, "image", keep=False)
    assert group.images.nbytes < 1.1 * 2**20
    (unit,) = decoded(file)
    reasons = [reason for _, _, reason in unit.bad]
    assert reasons[4:] == ["damaged row group: its rows repeat values to over 3145728 bytes"] * 60
    assert all("damaged row group" not in reason for reason in reasons[:4]), "these are read, and are no images"


def test_damage_and_repeated_values_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "REPEATED_BYTES", 3 * 2**20)
    file = tmp_path / "a.parquet"
    data = bomb(64, 2**20, pa.binary(), True)
    paths = pq.read_metadata(io.BytesIO(data)).row_group(0).column(1)
    end = paths.dictionary_page_offset + paths.total_compressed_size
    file.write_bytes(data[: end - 10] + b"\xff" * 10 + data[end:])
    footer = parquet.read_footer(str(file), file.stat().st_size)
    group = parquet.read_group(footer, 0, "image", keep=False)
    assert group.reason
    assert group.images.nbytes <= 4 * 2**20


def test_images_that_are_equal_are_read_as_others(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes([3, 4, 3, 3, 5] * 4, [0] * 20, row_group_size=10))
    (unit,) = decoded(tmp_path)
    assert not unit.bad
    expected = [Raw("", picture(number), 0).decode(8) for number in [3, 4, 3, 3, 5] * 4]
    assert np.array_equal(unit.pixels, np.stack(expected))


def test_damaged_labels_are_said_at_once(tmp_path: Path) -> None:
    rows = parquet_bytes([0, 1, 2], [0, 1, 2])
    begin = pq.read_metadata(io.BytesIO(rows)).row_group(0).column(2).data_page_offset
    (tmp_path / "a.parquet").write_bytes(rows[: begin - 12] + b"\xff" * 40 + rows[begin + 28 :])
    with pytest.raises(UserError, match=r"a\.parquet: the labels in column 'label' are damaged"):
        build_manifest(str(tmp_path))


def tar_with_damage(file: Path, name: str, junk: bytes) -> None:
    """Nine samples; the header of one member begins with other bytes."""
    data = tar_bytes(list(range(9)), [0, 1, 2] * 3)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        offset = archive.getmember(name).offset
    file.write_bytes(data[:offset] + junk + data[offset + len(junk) :])


@pytest.mark.parametrize(("junk", "said"), [(b"s00004.png" + bytes(2) + b"\xff" * 300, "s00004.png"), (b"\xff" * 512, None)])
def test_a_member_with_a_damaged_header_is_a_bad_image(tmp_path: Path, junk: bytes, said: str | None) -> None:
    tar_with_damage(tmp_path / "a.tar", "s00004.png", junk)
    (unit,) = decoded(tmp_path)
    assert unit.positions.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert unit.labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2]
    ((position, path, reason),) = unit.bad
    assert (position, reason) == (4, "the header before it in the tar is damaged")
    assert path == said or (said is None and path.startswith("header-at-byte-"))


def test_a_damaged_first_header_and_one_of_a_label(tmp_path: Path) -> None:
    tar_with_damage(tmp_path / "a.tar", "s00000.png", b"\xff" * 512)
    (unit,) = decoded(tmp_path)
    assert (len(unit.positions), len(unit.bad)) == (8, 1)
    tar_with_damage(tmp_path / "a.tar", "s00004.cls", b"s00004.cls" + bytes(2) + b"\xff" * 300)
    (unit,) = decoded(tmp_path)
    assert unit.labels.tolist() == [0, 1, 2, 0, -1, 2, 0, 1, 2]


@pytest.mark.parametrize("form", ["a.parquet", "a.tar", "1.png"])
def test_a_store_that_does_not_answer_is_no_bad_image(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"a.parquet": parquet_bytes([0, 1], [0, 1]), "a.tar": tar_bytes([0, 1], [0, 1]), "1.png": picture(1)}
    (tmp_path / form).write_bytes(made[form])
    manifest = build_manifest(str(tmp_path))

    def silent(*given: object) -> list[object]:
        raise StoreError("cannot reach it")

    monkeypatch.setattr(storage, "_fetch", silent)
    with pytest.raises(StoreError):
        decode_unit(manifest.units[0], manifest.reading, 8)
    with pytest.raises(StoreError):
        decode_images(manifest, manifest.units.edges()[:1], 8)
    monkeypatch.undo()
    assert len(decode_unit(manifest.units[0], manifest.reading, 8).positions) == manifest.num_images


@pytest.mark.parametrize("names", [["ant/1.png", "bee/1.png"], ["1.png", "2.png"]], ids=["classes", "flat"])
def test_a_lost_mount_makes_no_bad_image(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data, away = tmp_path / "data", tmp_path / "away"
    for number, name in enumerate(names):
        write(str(data / name), picture(number))
    manifest = build_manifest(str(data))

    def read() -> tuple[int, list[str]]:
        found = decode_unit(manifest.units[0], manifest.reading, 8)
        return len(found.positions), [path for _, path, _ in found.bad]

    data.rename(away)
    with pytest.raises(StoreError, match=rf"cannot reach {data}/\S+: {data}\S* is not there"):  # by autofs
        read()
    data.mkdir()
    with pytest.raises(StoreError, match=rf"cannot reach {data}/\S+: {data}\S* is (not there|empty)"):  # the mount point
        read()
    data.rmdir()
    away.rename(data)
    assert read() == (2, [])
    fetch = storage._fetch
    monkeypatch.setattr(storage, "_fetch", lambda wanted: [NotFound("no such file"), *fetch(wanted[1:])])
    with pytest.raises(StoreError, match="it was away for a moment"):
        read()
    monkeypatch.undo()
    (data / names[0]).unlink()
    assert read() == (1, [names[0]]), "an image that is gone, even the last of its class folder, is a bad one"
