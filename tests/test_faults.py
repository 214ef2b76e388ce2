"""What each error is put down to, with a real S3 server that fails in all its ways; and that waiting mends it."""

import errno
import io
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError, NoCredentialsError
from s3fs import S3FileSystem

from patchsae_ray import faults, storage
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import decode_unit
from patchsae_ray.errors import AccessError, NotFound, StoreError, UserError
from patchsae_ray.faults import as_ours, patiently, reaching
from patchsae_ray.filesystems import READAHEAD_BYTES
from patchsae_ray.writing import remove, remove_tree, write_bytes
from tests.data.makers import make_folder, parquet_bytes
from tests.faulty_proxy import LOST, RESET, FaultyProxy

ONCE = ["ExpiredToken", "ConditionalRequestConflict", "SlowDown", RESET, LOST]
READS: dict[str, Callable[[str], object]] = {
    "read_bytes": lambda uri: storage.read_bytes(uri),
    "read_many": lambda uri: storage.read_many([uri]),
    "read_ranges": lambda uri: storage.read_ranges([(uri, 1, 3)]),
    "open_read": lambda uri: storage.open_read(uri).read(),
    "exists": lambda uri: storage.exists(uri),
    "size": lambda uri: storage.size(uri),
    "entries": lambda uri: storage.entries(os.path.dirname(uri)),  # noqa: PTH120 - a URI
    "modified": lambda uri: storage.modified(uri),
}


@pytest.fixture
def file(faulty_s3: FaultyProxy, tmp_path: Path) -> str:
    uri = f"s3://bucket/{tmp_path.name}/file"
    write_bytes(uri, b"content")
    return uri


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `patiently`; those of botocore go on in their own loop."""
    sleep = time.sleep
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: sleep(seconds / 50))


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("fault", ONCE)
def test_every_read_survives_every_fault_of_the_store(faulty_s3: FaultyProxy, file: str, fault: str) -> None:
    for name, read in READS.items():
        undisturbed = read(file)
        failed = faulty_s3.fail(fault)
        assert patiently(partial(read, file), seconds=30) == undisturbed, name
        assert failed.met == 1, name


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("fault", ONCE)
def test_writes_and_removals_survive_every_fault_of_the_store(faulty_s3: FaultyProxy, file: str, fault: str) -> None:
    folder = file.rpartition("/")[0]
    for work in (lambda: write_bytes(file, b"new"), lambda: remove(file), lambda: remove_tree(folder)):
        failed = faulty_s3.fail(fault)
        patiently(work, seconds=30)
        assert failed.met == 1
    assert storage.entries(folder) == []


@pytest.fixture
def impatient_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the retries of botocore and s3fs."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("impatient_client")
@pytest.mark.parametrize(("fault", "kind"), [("InvalidToken", AccessError), ("InternalError", StoreError)])
def test_what_stays_refused_is_not_taken_for_missing(
    faulty_s3: FaultyProxy, file: str, fault: str, kind: type[StoreError]
) -> None:
    faulty_s3.fail(fault, times=1000)
    for name, read in READS.items():
        with pytest.raises(kind) as raised:
            read(file)
        assert type(raised.value) is kind, name
        assert "\n" not in str(raised.value)
        assert file.rpartition("/")[0] in str(raised.value)


def test_of_many_files_only_those_that_are_not_there_are_missing(faulty_s3: FaultyProxy, file: str) -> None:
    absent = f"{file}-absent"
    found = storage.read_many([absent, file])
    assert isinstance(found[0], NotFound)
    assert found[1] == b"content"
    faulty_s3.fail("AccessDenied", "GET", "/file$")
    with pytest.raises(AccessError, match="no permission for"):
        storage.read_many([absent, file])


@pytest.mark.usefixtures("s3_server")
def test_a_missing_bucket_makes_no_file_a_missing_one() -> None:
    """In mid-run it may be a wrong endpoint for a while; the image is as good as it was."""
    for read in (lambda uri: storage.read_many([uri]), storage.read_bytes, lambda uri: storage.open_read(uri).read()):
        with pytest.raises(StoreError, match=r"no such bucket: s3://nowhere/x$"):
            read("s3://nowhere/x")
    assert not storage.exists("s3://nowhere/x"), "at the start of a job this is said at once, as not there"


@pytest.mark.usefixtures("s3_server", "short_pauses")
@pytest.mark.parametrize("place", ["environment", "file"])
def test_renewed_credentials_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    right = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    kept = tmp_path / "credentials"

    def use(key: str, secret: str) -> None:
        if place == "environment":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        else:
            kept.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")

    uri = f"s3://bucket/{tmp_path.name}/file"
    write_bytes(uri, b"content")
    if place == "file":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(kept))
    use(right[0], "lapsed")
    S3FileSystem.clear_instance_cache()
    tries = []

    def read() -> bytes:
        tries.append(1)
        if len(tries) == 3:
            use(*right)
        return storage.read_bytes(uri)

    assert patiently(read, seconds=30) == b"content"
    assert len(tries) in (3, 4), "the first try after the renewal, or the one after it, succeeds"


@pytest.mark.usefixtures("s3_server")
def test_no_credentials_at_all_are_a_matter_of_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(AccessError, match=r"no permission for s3://bucket/x: Unable to locate credentials"):
        storage.read_bytes("s3://bucket/x")
    S3FileSystem.clear_instance_cache()


class Clock:
    """Stands in for the `time` module; only what the test says takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(faults, "time", made)
    return made


def failing(clock: Clock, attempts: list[float]) -> Callable[[], str]:
    """Work that fails after each of these times, in seconds, and then is done."""
    left = list(attempts)

    def work() -> str:
        if not left:
            return "done"
        clock.now += left.pop(0)
        raise StoreError("cannot reach it")

    return work


@pytest.mark.parametrize(
    "attempts",
    [[10_000.0], [10_000.0, 0.0, 100.0], [0.0, 250.0, 10_000.0, 0.0, 250.0], [0.0, 100.0, 100.0]],
    ids=["long work", "it fails again", "a long attempt after others", "short work"],
)
def test_only_failing_uses_patience_up(clock: Clock, attempts: list[float]) -> None:
    assert patiently(failing(clock, attempts), seconds=300) == "done"


@pytest.mark.parametrize("each", [0.0, 100.0, 400.0])
def test_a_store_that_never_answers_is_given_up(clock: Clock, each: float) -> None:
    """However long the client takes to find out each time."""
    with pytest.raises(StoreError):
        patiently(failing(clock, [each] * 1000), seconds=300)
    assert clock.now <= 6 * (each + 300)


def test_what_has_been_waited_for_is_not_waited_for_again(clock: Clock) -> None:
    """Where a share waits for each of its files, whoever runs the share does not wait once more."""
    given_up = []

    def share() -> None:
        try:
            patiently(failing(clock, [0.0] * 1000), seconds=300)
        except StoreError as error:
            given_up.append(clock.now)
            raise pickle.loads(pickle.dumps(error)) from None

    with pytest.raises(StoreError, match="cannot reach it"):
        patiently(share, seconds=300)
    assert len(given_up) == 1
    assert clock.now == given_up[0]


def answer(code: str, status: int, operation: str = "GetObject") -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)


class Answered(Exception):
    """As aiohttp, gcsfs, azure and huggingface_hub keep the status."""

    def __init__(self, **kept: object) -> None:
        super().__init__("answered")
        self.__dict__.update(kept)


class Response:
    status_code = 403


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answer("NoSuchKey", 404), NotFound),
        (answer("NoSuchBucket", 404), StoreError),
        (answer("NoSuchUpload", 404, "CompleteMultipartUpload"), StoreError),
        (answer("ExpiredToken", 400), AccessError),
        (answer("400", 400, "HeadObject"), AccessError),
        (answer("InvalidRequest", 400), StoreError),
        (answer("SlowDown", 503), StoreError),
        (answer("503", 503), StoreError),
        (answer("RequestTimeout", 400), StoreError),
        (NoCredentialsError(), AccessError),
        (Answered(status=401), AccessError),
        (Answered(status=404), NotFound),
        (Answered(code=429), StoreError),
        (Answered(status_code=403), AccessError),
        (Answered(response=Response()), AccessError),
        (TimeoutError(), StoreError),
        (ConnectionResetError(), StoreError),
        (FileNotFoundError("x"), NotFound),
        (IsADirectoryError("x"), NotFound),
        (PermissionError("x"), AccessError),
        (NotADirectoryError("x"), UserError),
        (NotImplementedError(), UserError),
        (OSError(28, "No space left on device"), StoreError),
        (OSError(errno.EINVAL, "Invalid argument"), StoreError),
        (RecursionError("maximum recursion depth exceeded"), UserError),
    ],
    ids=repr,
)
def test_what_an_error_is_put_down_to(error: Exception, kind: type[UserError]) -> None:
    assert type(as_ours(error, "s3://bucket/x")) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ImportError("install gcsfs"), UserError),
        (ValueError("Protocol not known: nope"), UserError),
        (PermissionError("the key file"), AccessError),
        (NoCredentialsError(), AccessError),
        (ConnectionResetError("the metadata server"), StoreError),
        (OSError(24, "Too many open files"), StoreError),
    ],
    ids=repr,
)
def test_a_client_that_cannot_be_made_is_put_down_to_its_cause(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[UserError]
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("patchsae_ray.filesystems.url_to_fs", fail)
    with pytest.raises(UserError, match="s3://bucket/x") as raised:
        storage.read_bytes("s3://bucket/x")
    assert type(raised.value) is kind


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG])
def test_what_a_path_of_this_machine_cannot_be_is_not_waited_for(number: int) -> None:
    for uri in ("/data/x", "file:///data/x"):
        assert type(as_ours(OSError(number, os.strerror(number)), uri)) is UserError


def test_running_out_of_memory_is_not_the_stores_fault() -> None:
    with pytest.raises(MemoryError), reaching("s3://bucket/x"):
        raise MemoryError


def test_a_damaged_content_is_not_the_stores_fault(faulty_s3: FaultyProxy, file: str, tmp_path: Path) -> None:
    whole = parquet_bytes(list(range(40)), None)
    damaged = whole[:200] + b"\xff" * 4000 + whole[4200:]
    write_bytes(file, damaged)
    with storage.open_read(file, cache="none") as opened, pytest.raises((OSError, pa.ArrowInvalid)) as raised:
        pq.ParquetFile(opened).read()
    assert not isinstance(raised.value, UserError)
    write_bytes(file, whole)
    faulty_s3.fail("AccessDenied", "GET", times=1000, skip=1)
    with storage.open_read(file, cache="none") as opened, pytest.raises(AccessError):
        pq.ParquetFile(opened).read()


def test_each_file_is_one_request_and_none_is_fetched_twice(faulty_s3: FaultyProxy, file: str) -> None:
    data = os.urandom(10_000_000)
    write_bytes(file, data)
    uris = [f"{file}-{number}" for number in range(20)]
    for uri in uris:
        write_bytes(uri, b"x" * 1000)
    with faulty_s3.counting() as requests:
        storage.read_many(uris)
    assert [request.method for request in requests] == ["GET"] * 20
    with faulty_s3.counting() as requests:
        storage.read_ranges([(file, 1000 * number, 1000 * number + 10) for number in range(50)])
    assert sum(request.answered for request in requests) == 500
    with faulty_s3.counting() as requests:
        storage.read_bytes(file)
    assert [request.method for request in requests] == ["GET"]
    with faulty_s3.counting() as requests, storage.open_read(file) as opened:
        got = io.BytesIO()
        while part := opened.read(100_000):
            got.write(part)
    assert got.getvalue() == data
    assert sum(request.answered for request in requests) == len(data)
    with faulty_s3.counting() as requests, storage.open_read(file) as opened:
        opened.seek(1_000_000)
        opened.read(100_000)
    assert sum(request.answered for request in requests) <= 100_000 + READAHEAD_BYTES
    with faulty_s3.counting() as requests, storage.open_read(file, cache="none") as opened:
        opened.seek(5_000_000)
        opened.read(1000)
    assert sum(request.answered for request in requests) == 1000


@pytest.mark.usefixtures("short_pauses")
def test_only_an_image_that_is_not_there_is_a_bad_one(faulty_s3: FaultyProxy, tmp_path: Path) -> None:
    data = f"s3://bucket/{tmp_path.name}/images"
    make_folder(data, 30)
    manifest = open_dataset("some", data, None, None)
    unit = manifest.units.read(0)
    undisturbed = decode_unit(unit, manifest.reading, 8)
    faulty_s3.fail("NoSuchKey", "GET", "/bee/00013.png", times=math.inf)
    failed = [faulty_s3.fail(fault, "GET", r"\.png$", times=3, skip=5) for fault in ONCE]
    found = patiently(lambda: decode_unit(unit, manifest.reading, 8), seconds=60)
    assert [rule.met for rule in failed] == [3] * len(failed)
    assert found.bad == [(13, "bee/00013.png", f"no such file: {data}/bee/00013.png")]
    others = undisturbed.positions != 13
    assert found.positions.tolist() == undisturbed.positions[others].tolist()
    assert (found.pixels == undisturbed.pixels[others]).all()
