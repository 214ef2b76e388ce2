"""How drivers of one run get its units done together; running a unit is a stand-in here, and there is no Ray."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsae_ray import storage
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.errors import NotFound, UserError
from patchsae_ray.pipelines import heartbeat, passes
from patchsae_ray.pipelines.bundles import Bundle, BundleFolder, Notes, bundle_name
from patchsae_ray.pipelines.claims import Desk, claim_name
from patchsae_ray.pipelines.given_up import GivenUp
from patchsae_ray.pipelines.heartbeat import Peers, heartbeat_name
from patchsae_ray.pipelines.merging import Helpers, Receipt
from patchsae_ray.pipelines.pass_record import BadTally, Pass
from patchsae_ray.pipelines.passes import UnitPass
from patchsae_ray.pipelines.results import ResultFolder
from patchsae_ray.pipelines.runner import Session
from patchsae_ray.writing import remove, remove_tree, write_bytes
from tests.benchmarks.pipeline import NoTracker, Totals
from tests.data.makers import parquet_bytes

OUTPUTS = {"a.bin": "key"}
IMAGES, UNITS = 9 * 512 + 10, 10


class Progress:
    """Records what the lines of progress would say."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done_elsewhere = 0

    def elsewhere(self, images: int) -> None:
        self.done_elsewhere = images

    def note(self, said: str) -> None:
        self.notes.append(said)


class Driver(UnitPass[Totals]):
    """A pass whose units are run by a function in this process."""

    def __init__(self, folder: Path, data: Path, work: Callable[[int], str], anew: bool = False) -> None:
        manifest = open_dataset("many", str(data), None, None)
        session = Session(None, NoTracker(), ResultFolder(str(folder), "extract", {}, OUTPUTS), anew)  # type: ignore[arg-type]
        super().__init__("extract", manifest, 16, None, Totals, session, "key", 0.9, 5.0)  # type: ignore[arg-type]
        self.work, self.progress, self.ran = work, Progress(), list[int]()

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *error: object) -> None:
        return

    def see_progress(self) -> None:
        return

    def run(self, *given: Any) -> Any:
        """The pass itself; and, asked as waves are, the units."""
        return self.receipts(*given) if given else super().run()

    def receipts(self, units: Sequence[int], desk: Desk) -> Iterator[Receipt]:
        sizes = np.diff(self.manifest.units.edges())
        for unit in units:
            if not desk.claim(unit):
                continue
            self.ran.append(unit)
            said = self.work(unit)
            if said == "lost":
                continue
            if said:
                yield Receipt((), 0, (), ((unit, said),))
                continue
            count = int(sizes[unit])
            self.folder.commit({"count": np.array([count])}, Notes([unit], count))
            yield Receipt((unit,), count, (), ())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    path.write_bytes(parquet_bytes(list(range(IMAGES)), None, row_group_size=512))
    return path


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "helpers", lambda local: Helpers(None, 0, 0, 1))
    monkeypatch.setattr(passes, "several_machines", lambda: False)
    monkeypatch.setattr(passes, "PAUSE_SECONDS", 0.01)


def together(drivers: Sequence[Driver], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Totals, Pass] | BaseException]:
    """What each of the drivers, run at the same time, returns or raises."""
    found: list[Any] = [None] * len(drivers)
    by_thread: dict[int, Driver] = {}
    monkeypatch.setattr(passes, "Waves", lambda *given: by_thread[threading.get_ident()])

    def run(index: int) -> None:
        by_thread[threading.get_ident()] = drivers[index]
        try:
            found[index] = drivers[index].run()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(drivers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_two_drivers_run_each_unit_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def side_by_side(unit: int) -> str:
        with suppress(threading.BrokenBarrierError):
            both.wait(1)
        return ""

    drivers = [Driver(tmp_path, data, side_by_side) for _ in range(2)]
    for found in together(drivers, monkeypatch):
        assert not isinstance(found, BaseException), found
        totals, kept = found
        assert totals.count == IMAGES
        assert kept.notes.units == list(range(UNITS))
    assert sorted(drivers[0].ran + drivers[1].ran) == list(range(UNITS))
    assert min(len(driver.ran) for driver in drivers) >= 3
    assert not list(tmp_path.rglob("alive-*")), "no heartbeat is left"


class Other:
    """Another driver, by what it writes: it has claimed every unit."""

    def __init__(self, driver: Driver) -> None:
        self.folder, self.sizes, self.beats = driver.folder, np.diff(driver.manifest.units.edges()), 0
        for unit in range(UNITS):
            write_bytes(storage.join(self.folder.uri, claim_name(unit, 0)), b'{"driver": "other"}')
        self.beat()

    def beat(self) -> None:
        self.beats += 1
        said = {"host": "far-away", "pid": 1, "machine": "", "beats": self.beats}
        write_bytes(storage.join(self.folder.uri, heartbeat_name("other")), json.dumps(said).encode())

    def commit(self, unit: int) -> None:
        self.folder.commit({"count": np.array([self.sizes[unit]])}, Notes([unit], int(self.sizes[unit])))


def test_who_finds_everything_claimed_waits_and_says_for_whom(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, data, lambda unit: "")
    other, left = Other(driver), list(range(UNITS))

    def meanwhile(seconds: float) -> None:
        other.beat()
        other.commit(left.pop())

    monkeypatch.setattr(passes.time, "sleep", meanwhile)
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert (driver.ran, found[0].count, found[1].images_here) == ([], IMAGES, 0)
    assert driver.progress.notes[0] == "waiting for the other driver's 10 units (on far-away)"
    assert driver.progress.notes[-1] == "waiting for the other driver's 1 units (on far-away)"
    assert driver.progress.done_elsewhere == IMAGES - 512


def test_the_units_of_a_driver_that_dies_are_taken_over(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "DEAD_AFTER_SECONDS", 0.02)
    driver = Driver(tmp_path, data, lambda unit: "")
    other = Other(driver)
    other.commit(0)
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert sorted(driver.ran) == list(range(1, UNITS))
    other.commit(1)  # it was not dead after all
    (again,) = together([Driver(tmp_path, data, lambda unit: "")], monkeypatch)
    assert not isinstance(again, BaseException), again
    assert again[0].count == found[0].count == IMAGES


def test_lost_work_is_run_again_and_what_is_lost_each_time_ends_the_pass(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [3, 3, 7]

    def sometimes(unit: int) -> str:
        if unit not in losses:
            return ""
        losses.remove(unit)
        return "lost"

    driver = Driver(tmp_path / "a", data, sometimes)
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert found[0].count == IMAGES
    assert [driver.ran.count(unit) for unit in (3, 7, 0)] == [3, 2, 1]
    (error,) = together([Driver(tmp_path / "b", data, lambda unit: "lost" if unit == 3 else "")], monkeypatch)
    assert isinstance(error, UserError)
    assert "unit 3 and 0 more were run 5 times, and nothing could be committed" in str(error)


def test_commits_that_a_listing_does_not_show_are_not_repeated(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = BundleFolder.list
    monkeypatch.setattr(BundleFolder, "list", lambda folder, entries=None: listed(folder, entries)[:2])
    driver = Driver(tmp_path, data, lambda unit: "")
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert driver.ran == list(range(UNITS))


@pytest.mark.parametrize("earlier", [True, False])
def test_bundles_that_are_gone_at_the_merge_are_made_again(
    earlier: bool, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        together([Driver(tmp_path, data, lambda unit: "")], monkeypatch)
    lost, read = [4, 9], BundleFolder.read

    def loses_some(folder: BundleFolder, bundle: Bundle) -> Any:
        while lost:
            remove(storage.join(folder.uri, bundle_name([lost.pop()])))
        return read(folder, bundle)

    monkeypatch.setattr(BundleFolder, "read", loses_some)
    driver = Driver(tmp_path, data, lambda unit: "")
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert sorted(driver.ran) == sorted([4, 9] if earlier else [*range(UNITS), 4, 9])
    assert found[0].count == IMAGES
    assert (found[1].units_before, found[1].images_here) == ((8, 512 + 10) if earlier else (0, IMAGES))


def test_a_bundle_that_cannot_be_found_though_it_is_listed_ends_the_pass(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(folder: BundleFolder, bundle: Bundle) -> Any:
        raise NotFound(f"{bundle.name} is not there")

    monkeypatch.setattr(BundleFolder, "read", nowhere)
    (error,) = together([Driver(tmp_path, data, lambda unit: "")], monkeypatch)
    assert isinstance(error, NotFound)


def finish(folder: Path) -> None:
    run = ResultFolder(str(folder), "extract", {}, OUTPUTS)
    run.write("a.bin", b"done")
    run.commit({"summary": {}})


def test_a_second_pass_of_a_run_that_was_finished_since_the_first_is_not_begun(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(tmp_path)
    second = Driver(tmp_path, data, lambda unit: "")
    (error,) = together([second], monkeypatch)
    assert str(error) == "extract: another driver has finished this run"
    assert second.ran == []
    again = Driver(tmp_path, data, lambda unit: "", anew=True)
    (found,) = together([again], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert (found[0].count, again.ran) == (IMAGES, list(range(UNITS)))


def test_a_run_that_another_driver_has_finished_is_not_begun_again(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    driver = Driver(tmp_path, data, lambda unit: "")
    other = Other(driver)

    def finishes(seconds: float) -> None:  # and takes the bundles away
        finish(tmp_path)
        remove_tree(other.folder.uri)

    monkeypatch.setattr(passes.time, "sleep", finishes)
    (error,) = together([driver], monkeypatch)
    assert str(error) == "extract: another driver has finished this run"
    assert driver.ran == []
    assert not (tmp_path / "bundles" / "key").exists()
    assert "extract: 0 images in 0 units were done by this driver, 10 units by others" in caplog.text


def test_a_unit_that_was_given_up_counts_until_another_driver_has_done_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, data, lambda unit: "unit 2 was given up" if unit == 2 else "")
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert [position for position, _, _ in found[1].bad] == list(range(2 * 512, 3 * 512))
    assert found[1].record()["bad_images"] == 512
    limited = Driver(tmp_path / "limited", data, driver.work)
    limited.max_bad_fraction = 0.01
    (error,) = together([limited], monkeypatch)
    assert isinstance(error, UserError)
    assert str(error).startswith("512 of 4618 images cannot be read, the first ")


def test_drivers_that_have_each_given_up_a_unit_do_not_wait_for_each_other(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, looks = threading.Barrier(2), itertools.count()

    def gives_up_its_first() -> Callable[[int], str]:
        begun: list[int] = []

        def work(unit: int) -> str:
            begun.append(unit)
            if len(begun) > 1:
                return ""
            both.wait(10)
            return f"unit {unit} was given up"

        return work

    def for_long(driver: Driver) -> None:
        if next(looks) > 200:
            raise UserError("both wait")

    monkeypatch.setattr(Driver, "see_progress", for_long)
    drivers = [Driver(tmp_path, data, gives_up_its_first()) for _ in range(2)]
    given_up = []
    for found in together(drivers, monkeypatch):
        assert not isinstance(found, BaseException), found
        given_up.append(sorted({reason for _, _, reason in found[1].bad}))
    assert given_up[0] == given_up[1] == sorted(f"unit {driver.ran[0]} was given up" for driver in drivers)
    assert sorted(drivers[0].ran + drivers[1].ran) == list(range(UNITS))
    (again,) = together([Driver(tmp_path, data, lambda unit: "")], monkeypatch)
    assert not isinstance(again, BaseException), again
    assert (again[0].count, again[1].bad, again[1].units_before) == (IMAGES, [], UNITS - 2)


@pytest.mark.parametrize("lives", [True, False])
def test_a_unit_given_up_before_counts_once_its_driver_is_seen_to_live(
    lives: bool, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "DEAD_AFTER_SECONDS", 0.02)
    driver = Driver(tmp_path, data, lambda unit: "")
    other = Other(driver)
    for unit in range(UNITS - 1):
        other.commit(unit)
    GivenUp(driver.folder.uri, "other", Peers(driver.folder.uri)).write(UNITS - 1, "unit 9 was given up")
    wait = time.sleep

    def meanwhile(seconds: float) -> None:
        wait(0.03)
        if lives:
            other.beat()

    monkeypatch.setattr(passes.time, "sleep", meanwhile)
    (found,) = together([driver], monkeypatch)
    assert not isinstance(found, BaseException), found
    assert driver.ran == ([] if lives else [UNITS - 1])
    assert {reason for _, _, reason in found[1].bad} == ({"unit 9 was given up"} if lives else set())


def test_bad_images_are_counted_by_unit_as_they_come() -> None:
    tally = BadTally()
    tally.add(7, 3, (3600, "b.png", "cut"))
    tally.add(2, 1, (1030, "a.png", "cut"))
    tally.add(7, 3, (3600, "b.png", "cut"))  # committed twice
    assert (tally.total, tally.first[1]) == (4, "a.png")
    tally.forget(2)
    tally.forget(5)
    assert tally.total == 3
