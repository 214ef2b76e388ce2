"""How much is read of data sets on S3: requests and bytes, as the store sees them."""

import io
import tarfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from patchsae_ray.data import listing
from patchsae_ray.data.kept import find_or_make, keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.sources import Source, build_manifest
from patchsae_ray.data.units import decode_images, decode_unit, read_unit
from tests.conftest import S3Server
from tests.data.makers import make_folder, picture, write

SIZE = 20_000
"""Bytes of a content that stands for an image."""


@dataclass
class Traffic:
    """What was asked of S3."""

    calls: list[str] = field(default_factory=list)
    bytes: int = 0
    """Of all objects' contents that came back."""

    def clear(self) -> None:
        self.calls, self.bytes = [], 0


@pytest.fixture
def traffic(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Traffic:
    found = Traffic()
    call = S3FileSystem._call_s3

    async def counted(self: S3FileSystem, method: str, *given: object, **options: object) -> Any:
        said = await call(self, method, *given, **options)
        found.calls.append(method)
        if method == "get_object":
            found.bytes += int(said["ContentLength"])
        return said

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    return found


def content(number: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(number).bytes(size)


def write_parquet(uri: str, count: int, group: int) -> None:
    images = [{"bytes": content(number), "path": f"{number}.png"} for number in range(count)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [n % 7 for n in range(count)]}), buffer, row_group_size=group)
    write(uri, buffer.getvalue())


def write_tar(uri: str, count: int, size: int = SIZE) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(count):
            for name, data in {f"s{number:05d}.png": content(number, size), f"s{number:05d}.cls": b"3"}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    write(uri, buffer.getvalue())


def read_all(manifest: Manifest, index: int) -> list[object]:
    return [raw.data for raw in read_unit(manifest.units.read(index), manifest.reading)]


def test_parquet(traffic: Traffic) -> None:
    write_parquet("s3://bucket/bytes/parquet/a.parquet", 700, 100)
    traffic.clear()
    manifest = build_manifest("s3://bucket/bytes/parquet")
    assert traffic.bytes < 0.05 * 700 * SIZE
    assert [unit.count for unit in manifest.units] == [500, 200]
    traffic.clear()
    assert read_all(manifest, 1) == [content(number) for number in range(500, 700)]
    assert 200 * SIZE < traffic.bytes < 1.05 * 200 * SIZE
    assert set(traffic.calls) == {"get_object"}
    traffic.clear()
    assert read_all(manifest, 0) == [content(number) for number in range(500)]
    assert traffic.bytes < 1.02 * 500 * SIZE, "the footer is known"


@pytest.mark.parametrize("group", [600, 1000])
def test_a_row_group_of_up_to_1024_rows_is_read_once(group: int, traffic: Traffic) -> None:
    write_parquet(f"s3://bucket/bytes/groups{group}/a.parquet", group, group)
    manifest = build_manifest(f"s3://bucket/bytes/groups{group}")
    traffic.clear()
    found = [data for index in range(len(manifest.units)) for data in read_all(manifest, index)]
    assert len(found) == group
    assert traffic.bytes < 1.02 * group * SIZE


def test_tars(traffic: Traffic) -> None:
    write_tar("s3://bucket/bytes/tar/a.tar", 600)
    whole = 600 * (SIZE + 2000)
    traffic.clear()
    manifest = build_manifest("s3://bucket/bytes/tar")
    assert traffic.bytes < 1.05 * whole, "one scan in order"
    traffic.clear()
    assert read_all(manifest, 0) == [content(number) for number in range(512)]
    assert traffic.bytes < 1.02 * 512 * (SIZE + 2000), "headers and labels are read over"
    assert set(traffic.calls) == {"get_object"}
    assert len(traffic.calls) < 4
    traffic.clear()
    for first in range(0, 512, 64):
        decode_unit(manifest.units.read(0), manifest.reading, 8, first, 64)
    assert traffic.bytes < 1.02 * 512 * (SIZE + 2000), "in pieces it costs no more"
    traffic.clear()
    found = decode_images(manifest, np.array([577, 3, 3, 150]), 8)
    assert len(found.bad) == 4, "these are no images"
    assert traffic.bytes == 3 * SIZE
    assert traffic.calls == ["get_object"] * 3


def test_contents_of_a_tar_that_are_long_are_passed_over(traffic: Traffic) -> None:
    write_tar("s3://bucket/bytes/long/a.tar", 3, 16 * 2**20)
    traffic.clear()
    assert build_manifest("s3://bucket/bytes/long").num_images == 3
    assert traffic.bytes < 0.5 * 3 * 16 * 2**20


def test_folders(traffic: Traffic) -> None:
    make_folder("s3://bucket/bytes/folder", 9)
    traffic.clear()
    manifest = build_manifest("s3://bucket/bytes/folder")
    assert traffic.bytes == 0
    traffic.clear()
    assert read_all(manifest, 0) == [picture(number) for number in range(9)]
    assert traffic.calls == ["get_object"] * 9
    traffic.clear()
    decode_images(manifest, np.array([7, 2]), 8)
    assert traffic.calls == ["get_object"] * 2


def test_a_kept_manifest_is_read_by_units(traffic: Traffic) -> None:
    make_folder("s3://bucket/bytes/kept/data", 9)
    source, root = Source("s3://bucket/bytes/kept/data"), "s3://bucket/bytes/kept/root"
    made = keep(find_or_make(source, root, False))
    traffic.clear()
    again = find_or_make(source, root, False)
    assert traffic.calls.count("get_object") == 2, "the note, and where the units begin"
    traffic.clear()
    assert again.units.edges().tolist() == [0, 9]
    assert not traffic.calls
    assert list(again.units) == list(made.units)


def test_a_long_listing_comes_page_by_page(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        write(f"s3://bucket/pages/ant/{number}.png", b"x" * number)
    call = S3FileSystem.call_s3
    pages: list[object] = []

    def short(self: S3FileSystem, method: str, **options: object) -> Any:
        pages.append(options)
        return call(self, method, **options, MaxKeys=3)

    monkeypatch.setattr(S3FileSystem, "call_s3", short)
    found = listing.list_branch(listing.Branch("s3://bucket/pages", "ant", True))
    assert found.images["path"].to_pylist() == [f"ant/{number}.png".encode() for number in range(7)]
    assert found.images["size"].to_pylist() == list(range(7))
    assert len(pages) == 3
