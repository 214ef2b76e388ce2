"""The files of a kept manifest: each is fetched once, and what is wrong with one says how it is put right."""

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from patchsae_ray import storage
from patchsae_ray.data import tables
from patchsae_ray.data.making import kept_part, write_named
from patchsae_ray.data.manifest import even_edges
from patchsae_ray.data.tables import Part, UnitTable, rows_of
from patchsae_ray.errors import NotFound, StoreError, UserError

COUNT, EACH = 10, 1000
"""Parts; images of a part."""


def table(folder: str, parts: int = COUNT) -> UnitTable:
    """Parts of two batches each; an image's label is its position."""
    made = []
    for part in range(parts):
        at = np.arange(EACH) + EACH * part
        rows = rows_of([f"{folder}/images"], 0 * at, pa.array([b"%d" % one for one in at], pa.binary()), at, at)
        made.append(kept_part(Part.of(rows), folder))
    labels = write_named(folder, np.arange(parts * EACH, dtype="<i4").tobytes(), ".labels")
    return UnitTable(tuple(made), even_edges(parts * EACH), labels)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read whole, each of which takes a moment."""
    found: list[str] = []
    fetch = storage._fetch

    def slow(wanted: Any) -> Any:
        found.extend(uri for uri, _, _ in wanted)
        Event().wait(0.02)
        return fetch(wanted)

    monkeypatch.setattr(storage, "_fetch", slow)
    monkeypatch.setattr("patchsae_ray.faults.time.sleep", lambda seconds: pytest.fail("waits for a store that is there"))
    return found


def test_scattered_images_fetch_each_part_and_the_labels_once(tmp_path: Path, fetched: list[str]) -> None:
    units = table(f"memory://{tmp_path.name}/parts")
    fetched.clear()
    for seed in range(3):
        positions = np.random.default_rng(seed).permutation(COUNT * EACH)[:64]
        rows = units.take(positions)
        assert rows.column("at").to_pylist() == positions.tolist()
        assert rows.column("label").to_pylist() == positions.tolist()
    assert sorted(fetched) == sorted([*(part.uri for part in units.parts), str(units.label_source)])


def test_parts_that_do_not_fit_are_let_go(tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    units = table(f"memory://{tmp_path.name}/small", parts=3)
    limit = max(len(part.in_memory().data) for part in units.parts) + 1
    monkeypatch.setattr(tables, "_files", tables.SharedCache(limit, lambda file: file.weight))
    tables._batch.cache_clear()
    fetched.clear()
    for position in (0, EACH, 2 * EACH, 600):  # the last one is of the first part's second batch
        units.take(np.array([position]))
    assert [uri for uri in fetched if uri.endswith(".part")] == [units.parts[part].uri for part in (0, 1, 2, 0)]


@pytest.mark.parametrize("place", ["memory", "here"])
@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_damaged_part_is_said_at_once(tmp_path: Path, place: str, damage: str, fetched: list[str]) -> None:
    units = table(f"memory://{tmp_path.name}/{damage}" if place == "memory" else str(tmp_path), parts=1)
    (part,) = units.parts
    whole = storage.read_bytes(part.uri)
    filesystem, path = storage.filesystem_of(part.uri)
    filesystem.pipe_file(path, whole[:200] if damage == "cut" else whole[:700] + bytes(len(whole) - 1400) + whole[-700:])
    with pytest.raises(UserError, match=r"\.part is damaged \(.+\); --relist makes it again") as found:
        list(units)
    assert not isinstance(found.value, StoreError)


@pytest.mark.parametrize("place", ["memory", "here"])
def test_a_part_or_labels_that_are_gone_or_cut_short_say_so(tmp_path: Path, place: str, fetched: list[str]) -> None:
    units = table(f"memory://{tmp_path.name}/gone" if place == "memory" else str(tmp_path), parts=1)
    labels = str(units.label_source)
    filesystem, path = storage.filesystem_of(labels)
    filesystem.pipe_file(path, b"12345")
    with pytest.raises(UserError, match=r"\.labels is damaged: 5 bytes, expected 4000; --relist makes it again"):
        units.labels()
    filesystem.rm_file(path)
    with pytest.raises(NotFound, match=r"\.labels, which a kept manifest needs; --relist makes it again"):
        units.labels()
    filesystem.rm_file(storage.filesystem_of(units.parts[0].uri)[1])
    with pytest.raises(NotFound, match=r"\.part, which a kept manifest needs; --relist makes it again"):
        units.read(0)


def test_a_store_that_is_away_is_waited_for_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rows of a folder are read once more for its digest."""
    units = table(f"memory://{tmp_path.name}/away", parts=2)
    fetch = storage._fetch
    failed: set[str] = set()

    def once(wanted: Any) -> Any:
        if str(wanted) not in failed:
            failed.add(str(wanted))
            raise StoreError("cannot reach it")
        return fetch(wanted)

    monkeypatch.setattr(storage, "_fetch", once)
    monkeypatch.setattr("patchsae_ray.faults.time.sleep", lambda seconds: None)
    rows = [row for part in units.parts for batch in part.each() for row in batch.column("at").to_pylist()]
    assert rows == list(range(2 * EACH))
    assert len(failed) == 2
