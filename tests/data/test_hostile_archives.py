"""Tars and Parquet files that claim what they do not hold: one line that names the file, and no memory taken."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsae_ray.data.sources import build_manifest
from patchsae_ray.errors import StoreError, UserError
from tests.data.makers import picture


def member(name: str, data: bytes, claims: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header, in GNU's form, and its content."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if claims is None else claims, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def tar(path: Path, *members: bytes) -> None:
    path.write_bytes(b"".join([member("a.png", picture(1)), *members, bytes(1024)]))


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (member("a.cls", b"4000000000"), r"/x\.tar: a\.cls holds b'4000000000'; a number below 2\^31 would be right"),
        (member("a.cls", b"cat"), r"/x\.tar: a\.cls holds b'cat'; a number"),
        (member("a.cls", b"9" * 5_000), r"/x\.tar: a\.cls holds b'9+'; a number"),
        (member("a.cls", b"1", claims=2**35), r"/x\.tar"),
        (member("././@LongLink", b"a", claims=2**35, kind=tarfile.GNUTYPE_LONGNAME), r"/x\.tar: the header at byte \d+ claims"),
        (member("b.png", b"a", claims=2**60), r"/x\.tar is not a whole tar of images and .cls numbers: unexpected end of data"),
        (member("b.png", b"a", claims=2**80), r"/x\.tar is not a whole tar of images and .cls numbers: unexpected end of data"),
    ],
)
def test_a_tar_that_claims_what_it_does_not_hold(added: bytes, reason: str, tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", added)
    with pytest.raises(UserError, match=reason) as raised:
        build_manifest(str(tmp_path))
    assert not isinstance(raised.value, StoreError), "this is not waited for"


def test_labels_of_a_tar_may_have_blanks_around_them(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", member("a.cls", b" 7\n"))
    assert build_manifest(str(tmp_path)).num_classes == 8


SHAPES = [
    5,
    {"info": [1]},
    {"info": {"features": [1]}},
    {"info": {"features": {"label": [1]}}},
    {"info": {"features": {"label": {"names": 5}}}},
]


@pytest.mark.parametrize("said", ["[" * 100_000, *map(json.dumps, SHAPES)], ids=lambda said: said[:60])
def test_class_names_of_another_shape_are_none(said: str, tmp_path: Path) -> None:
    image = pa.array([{"bytes": picture(1), "path": "1.png"}])
    table = pa.table({"image": image, "label": pa.array([0])}).replace_schema_metadata({"huggingface": said})
    pq.write_table(table, tmp_path / "a.parquet")
    assert build_manifest(str(tmp_path)).classnames == ()


def test_an_archive_whose_name_is_no_utf8_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO(member("a.png", picture(1)) + bytes(1024))
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"/\\xff\.tar: this name is not UTF-8"):
        build_manifest(str(tmp_path))
