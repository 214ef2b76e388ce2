"""Reading under any URI: ranges, several files at once, and what each error is taken for."""

from pathlib import Path

import pytest

from patchsae_ray.errors import NotFound, UserError
from patchsae_ray.storage import absolute, join, read_many, read_ranges
from tests.data.makers import write

PLACES = ["local", "memory://ranges", "s3://bucket/ranges"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param.startswith("s3"):
        request.getfixturevalue("s3_server")
    return str(tmp_path) if request.param == "local" else str(request.param)


def test_ranges_of_several_files(place: str) -> None:
    first, second = join(place, "a [1].bin"), join(place, "b*.bin")
    write(first, bytes(range(100)))
    write(second, b"second")
    wanted = [(first, 10, 20), (second, 0, 6), (first, 5, 5), (first, 99, 100), (first, 10, 12)]
    assert read_ranges(wanted) == [bytes(range(10, 20)), b"second", b"", bytes([99]), bytes([10, 11])]
    assert read_ranges([]) == []
    for begin, end in [(2, 7), (6, 8), (9, 12)]:
        with pytest.raises(UserError, match=r"b\*\.bin is cut short"):
            read_ranges([(first, 0, 1), (second, begin, end)])
    with pytest.raises(NotFound, match=r"no such file: .*absent"):
        read_ranges([(first, 0, 1), (join(place, "absent"), 0, 1)])


def test_many_files_each_with_its_bytes_or_its_absence(place: str) -> None:
    names = ["x [1].png", "empty", "absent", "y"]
    contents = {"x [1].png": b"one", "empty": b"", "y": b"two"}
    for name, data in contents.items():
        write(join(place, name), data)
    found = read_many([join(place, name) for name in names])
    assert [found[0], found[1], found[3]] == [b"one", b"", b"two"]
    assert isinstance(found[2], NotFound)
    assert read_many([]) == []


def test_a_path_is_absolute_and_a_uri_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert absolute("~/a/../b") == "/home/me/b"
    assert absolute("$HOME/a") == "/home/me/a"
    assert absolute("a") == str(tmp_path / "a")
    assert absolute("s3://bucket/~/a") == "s3://bucket/~/a"
