"""Writing under any URI: whole or not at all, never over another's, together with others."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from patchsae_ray import storage, writing
from patchsae_ray.errors import AccessError, StoreError, UserError
from patchsae_ray.writing import check_writable, create, remove_tree, update, write_bytes
from tests.faulty_proxy import LOST, FaultyProxy

CONFLICT = "ConditionalRequestConflict"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    return str(tmp_path) if request.param == "local" else f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def bucket(faulty_s3: FaultyProxy, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refuse)


def test_the_first_to_create_wins_and_the_same_bytes_are_its_own(folder: str) -> None:
    uri = storage.join(folder, "deep/file")
    assert create(uri, b"first")
    assert not create(uri, b"second")
    assert create(uri, b"first")
    assert storage.read_bytes(uri) == b"first"
    assert [entry.path for entry in storage.entries(folder)] == ["deep/file"]


@pytest.mark.usefixtures("no_hard_links")
def test_without_hard_links_nothing_is_replaced_either(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = str(tmp_path / "folder" / "file")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: create(uri, b"%d" % number), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
    with caplog.at_level(logging.WARNING):
        check_writable(str(tmp_path / "folder"))
    assert "has no hard links" in caplog.text
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_the_umask_is_the_whole_processs_and_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is set to 0 to read it, another thread's files would get rights that nobody has granted."""
    umask, before = os.umask, os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"the umask is set to {mask:#o}"))
        write_bytes(str(tmp_path / "written"), b"x")
        assert create(str(tmp_path / "created"), b"x")
    finally:
        umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_updates_by_many_lose_none(folder: str) -> None:
    uri = storage.join(folder, "results/count")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: update(uri, lambda old: b"%d" % (int(old or 0) + 1)), range(12)))
    assert storage.read_bytes(uri) == b"12"


def test_a_killed_writer_lets_go_of_the_lock(tmp_path: Path) -> None:
    uri = str(tmp_path / "results" / "count")
    command = (
        "import os, sys; from patchsae_ray.writing import update\nupdate(sys.argv[1], lambda old: os.kill(os.getpid(), 9))"
    )
    subprocess.run([sys.executable, "-c", command, uri], check=False)
    update(uri, lambda old: b"%d" % (int(old or 0) + 1))
    assert storage.read_bytes(uri) == b"1"


def test_a_lock_that_is_held_too_long_is_the_stores_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_LOCK_SECONDS", 0.1)
    uri = str(tmp_path / "results" / "count")
    inside, leave = threading.Event(), threading.Event()

    def hold(old: bytes | None) -> bytes:
        inside.set()
        leave.wait(10)
        return b""

    holder = threading.Thread(target=update, args=(uri, hold))
    holder.start()
    inside.wait(10)
    with pytest.raises(StoreError, match=r"results: .*\.results\.lock"):
        update(uri, lambda old: b"")
    leave.set()
    holder.join()


@pytest.mark.parametrize("fault", [CONFLICT, LOST, "SlowDown", "InternalError"])
def test_creating_survives(faulty_s3: FaultyProxy, bucket: str, fault: str) -> None:
    uri = storage.join(bucket, "file")
    failed = faulty_s3.fail(fault, "PUT", "/file")
    assert create(uri, b"mine")
    assert failed.met == 1
    assert not create(uri, b"another's")
    assert storage.read_bytes(uri) == b"mine"


@pytest.mark.parametrize("fault", [CONFLICT, LOST, "SlowDown", "InternalError"])
def test_updating_survives(faulty_s3: FaultyProxy, bucket: str, fault: str) -> None:
    uri = storage.join(bucket, "names")
    for name in ("one", "two"):  # without an object there, and with one
        failed = faulty_s3.fail(fault, "PUT", "/names")
        update(uri, lambda old, name=name: json.dumps(sorted({*json.loads(old or b"[]"), name})).encode())
        assert failed.met == 1
    assert json.loads(storage.read_bytes(uri)) == ["one", "two"]


def test_conflicts_without_end_are_the_stores_fault(
    faulty_s3: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_pause", lambda attempt: None)
    faulty_s3.fail(CONFLICT, "PUT", "/file", times=1000)
    with pytest.raises(StoreError, match=r"/file: others keep writing it"):
        create(storage.join(bucket, "file"), b"")


def test_a_put_of_several_parts_whose_last_answer_is_lost(
    faulty_s3: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, _ = storage.filesystem_of(bucket)
    whole = filesystem.pipe_file
    monkeypatch.setattr(filesystem, "pipe_file", lambda *a, **k: whole(*a, chunksize=5 * 2**20, **k))
    data = os.urandom(11 * 2**20)
    uri = storage.join(bucket, "large")
    failed = faulty_s3.fail(LOST, "POST", "uploadId=")
    assert storage.patiently(lambda: create(uri, data), seconds=30)
    assert failed.met == 1
    assert storage.read_bytes(uri) == data


def test_a_tree_goes_in_few_requests(faulty_s3: FaultyProxy, bucket: str) -> None:
    for number in range(30):
        write_bytes(storage.join(bucket, f"run/{number} & [x]"), b"x")
    write_bytes(storage.join(bucket, "other"), b"x")
    with faulty_s3.counting() as requests:
        remove_tree(storage.join(bucket, "run"))
    assert [entry.path for entry in storage.entries(bucket)] == ["other"]
    assert [request.method for request in requests if request.method in ("DELETE", "POST")] == ["POST"]


def test_a_tree_in_memory_goes_too() -> None:
    write_bytes("memory://tree/run/file", b"x")
    remove_tree("memory://tree/run")
    assert not storage.exists("memory://tree/run/file")
    remove_tree("memory://tree/run")


def test_a_file_that_cannot_be_removed_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(storage.join(bucket, "run/kept"), b"x")
    filesystem, _ = storage.filesystem_of(bucket)

    def answer(code: str) -> None:
        said = {"Errors": [{"Key": "run/kept", "Code": code, "Message": "says the test"}]}
        monkeypatch.setattr(type(filesystem), "call_s3", lambda *a, **k: said)

    answer("AccessDenied")
    with pytest.raises(AccessError, match=r"cannot remove 1 files, the first s3://bucket/run/kept: says the test"):
        remove_tree(storage.join(bucket, "run"))
    answer("InternalError")
    with pytest.raises(StoreError, match="the first s3://bucket/run/kept"):
        remove_tree(storage.join(bucket, "run"))
    answer("NoSuchKey")
    remove_tree(storage.join(bucket, "run"))


def test_rights_below_the_root_are_enough(faulty_s3: FaultyProxy, bucket: str) -> None:
    faulty_s3.fail("AccessDenied", path=r"^/bucket/?(\?(?!.*prefix=[^&])|$)", times=1000)
    with pytest.raises(AccessError):
        storage.entries("s3://bucket")
    check_writable(storage.join(bucket, "team/results"))
    faulty_s3.pass_all()
    assert storage.entries(bucket) == [], "nothing is left of the trial"


def test_a_root_that_cannot_be_written(faulty_s3: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    faulty_s3.fail("AccessDenied", "PUT", times=1000)
    with pytest.raises(AccessError, match="no permission for s3://bucket"):
        check_writable(bucket)
    faulty_s3.pass_all()
    with pytest.raises(StoreError, match=r"no such bucket: s3://nowhere/run$"):
        check_writable("s3://nowhere/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder that can be written"):
        check_writable(str(tmp_path / "file"))
    check_writable(str(tmp_path / "new" / "deep"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError) as raised:
        check_writable(str(tmp_path / "results"))
    assert type(raised.value) is UserError
    assert str(raised.value).startswith(f"--root_dir {tmp_path}/results: files in {tmp_path} cannot be locked")
    assert os.strerror(number) in str(raised.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left of the trial"
    with pytest.raises(StoreError, match=os.strerror(number)):
        update(str(tmp_path / "results" / "count"), lambda old: pytest.fail("done without the lock"))


@pytest.mark.parametrize(("ignored", "header"), [("mode", "If-None-Match"), ("IfMatch", "If-Match")])
def test_a_store_that_ignores_conditions_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ignored: str, header: str
) -> None:
    filesystem, _ = storage.filesystem_of(bucket)
    whole = filesystem.pipe_file

    def put(*given: Any, **conditions: Any) -> None:
        whole(*given, **{name: value for name, value in conditions.items() if name != ignored})

    with caplog.at_level(logging.WARNING):
        check_writable(bucket)
        assert not caplog.text
        monkeypatch.setattr(filesystem, "pipe_file", put)
        check_writable(bucket)
    assert f"ignores conditional writes ({header})" in caplog.text
    assert caplog.text.count("ignores conditional") == 1
    assert storage.entries(bucket) == []
