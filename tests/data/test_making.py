"""A manifest is the same whoever makes its parts, and however it is cut."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsae_ray import storage
from patchsae_ray.data import folders, kept, making, sources, tables
from patchsae_ray.data.kept import find_or_make, keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.sources import Source, build_manifest
from patchsae_ray.data.units import decode_images, decode_unit
from patchsae_ray.errors import StoreError
from tests.data.makers import parquet_bytes, picture, tar_bytes, write


def elsewhere(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """A TaskRunner whose work and results go through bytes, as to another process."""
    for item in items:
        yield pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(work))(pickle.loads(pickle.dumps(item)))))


def make_source(root: str, form: str) -> None:
    for index in range(24):
        if form == "folder":
            for number in range(index % 4):
                write(f"{root}/class{index % 20:02d}{'-b' * (index // 20)}/{number}.png", picture(10 * index + number))
        elif form == "parquet":
            labels: list[object] = ["ant", "bee", None, f"c{index}"]
            write(f"{root}/{index:02d}.parquet", parquet_bytes(list(range(4 * index, 4 * index + 4)), labels, names=False))
        else:
            write(f"{root}/{index:02d}.tar", tar_bytes([2 * index, 2 * index + 1], [index, 0]))


@pytest.mark.parametrize("form", ["folder", "parquet", "tar"])
def test_the_same_by_tasks(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"memory://{tmp_path.name}/{form}"
    make_source(data, form)
    monkeypatch.setattr(tables, "ROWS_A_BATCH", 2)
    monkeypatch.setattr(folders, "ROWS_A_PART", 3)
    monkeypatch.setattr(making, "ROWS_A_PART", 3)
    here = build_manifest(data)
    by_tasks = find_or_make(Source(data), str(tmp_path / "root"), False, elsewhere)
    assert all(part.uri and not part.data for part in by_tasks.units.parts), "the rows are in files, not here"
    loaded = [keep(by_tasks), find_or_make(Source(data), str(tmp_path / "root"), False, elsewhere)]
    for other in [by_tasks, *loaded, pickle.loads(pickle.dumps(loaded[1]))]:
        same(here, other)


def same(one: Manifest, other: Manifest) -> None:
    assert (one.digest, one.units_digest) == (other.digest, other.units_digest)
    assert (one.classnames, one.num_classes, one.reading) == (other.classnames, other.num_classes, other.reading)
    assert (one.encoded_bytes, one.ignored_files) == (other.encoded_bytes, other.ignored_files)
    assert np.array_equal(one.label_array(), other.label_array())
    assert list(one.units) == list(other.units)
    wanted = np.arange(one.num_images)[::-3]
    found = [decode_images(manifest, wanted, 8) for manifest in (one, other)]
    assert np.array_equal(found[0].pixels, found[1].pixels)
    assert np.array_equal(found[0].labels, found[1].labels)


@pytest.mark.parametrize("shares", [1, 5, 24])
@pytest.mark.parametrize("form", ["folder", "parquet", "tar"])
def test_the_same_however_it_is_cut(form: str, shares: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(str(tmp_path), form)
    whole = build_manifest(str(tmp_path))
    monkeypatch.setattr(sources, "SHARES", shares)
    same(whole, build_manifest(str(tmp_path)))


def test_few_parts_are_made_here_and_nothing_is_written_before_a_run_begins(tmp_path: Path) -> None:
    data = f"memory://{tmp_path.name}/few"
    for name in ("ant", "bee"):
        write(f"{data}/{name}/1.png", picture(1))
    made = find_or_make(Source(data), str(tmp_path / "root"), False, lambda *given: pytest.fail("tasks for two folders"))
    assert made.num_images == 2
    assert not (tmp_path / "root").exists()


def test_a_store_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a run is under way: writing the manifest, reading its parts and labels; each request fails once."""
    data, root = f"memory://{tmp_path.name}/away", f"memory://{tmp_path.name}/root"
    for name in ("ant", "bee"):
        write(f"{data}/{name}/1.png", picture(1))
    failed: set[object] = set()
    fetch, info = storage._fetch, storage.info

    def once(wanted: Any) -> Any:
        if str(wanted) not in failed:
            failed.add(str(wanted))
            raise StoreError("cannot reach it")
        return fetch(wanted)

    def asked_once(uri: str) -> Any:
        if uri not in failed:
            failed.add(uri)
            raise StoreError("cannot reach it")
        return info(uri)

    made = find_or_make(Source(data), root, False)
    monkeypatch.setattr(storage, "_fetch", once)
    monkeypatch.setattr(storage, "info", asked_once)
    monkeypatch.setattr("patchsae_ray.faults.time.sleep", lambda seconds: None)
    with pytest.raises(StoreError):
        find_or_make(Source(data), root, False)
    kept_now = keep(made)
    again = pickle.loads(pickle.dumps(kept_now))
    unit = again.units.read(0)
    assert unit.images.column("name").to_pylist() == [b"ant/1.png", b"bee/1.png"]
    assert unit.images.column("label").to_pylist() == [0, 1]
    assert len([one for one in failed if ".part" in str(one) or ".labels" in str(one)]) >= 2
    assert len(storage.patiently(lambda: decode_unit(unit, again.reading, 8)).positions) == 2


@pytest.mark.parametrize("form", ["folder", "parquet", "tar"])
def test_a_store_that_is_away_costs_a_share_one_file_and_not_all(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is looked into, and each part written, once more than it failed; all lie in one share."""
    data = f"memory://{tmp_path.name}/{form}"
    make_source(data, form)
    undisturbed = build_manifest(data)
    monkeypatch.setattr(sources, "SHARES", 1)
    monkeypatch.setattr(making, "TASKS_FROM", 1)
    monkeypatch.setattr("patchsae_ray.faults.time.sleep", lambda seconds: None)
    asked: Counter[str] = Counter()

    def failing_once(function: Callable[..., Any]) -> Callable[..., Any]:
        def asked_for(*given: Any) -> Any:
            asked[repr(given)] += 1
            if asked[repr(given)] == 1:
                raise StoreError("cannot reach it")
            return function(*given)

        return asked_for

    for module, name in ((folders, "list_branch"), (sources, "scan_parquet"), (sources, "scan_tar"), (making, "create")):
        monkeypatch.setattr(module, name, failing_once(getattr(module, name)))
    found = find_or_make(Source(data), str(tmp_path / "root"), False, lambda work, items: map(work, items))
    monkeypatch.undo()
    same(undisturbed, found)
    assert len(asked) > 16
    assert set(asked.values()) == {2}


def test_a_kept_manifest_of_an_older_version_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, root = f"memory://{tmp_path.name}/old", tmp_path / "root"
    write(f"{data}/ant/1.png", picture(1))
    keep(find_or_make(Source(data), str(root), False))
    (note,) = (root / "out" / "manifests").glob("*.json")
    note.write_text(note.read_text().replace('"format": 2,\n', ""))
    with caplog.at_level("INFO", logger=kept.__name__):
        assert keep(find_or_make(Source(data), str(root), False)).num_images == 1
    assert "the kept one is of an older version; it is made again" in caplog.text
    assert '"format": 2' in note.read_text()
