"""Drivers of one run share its units by claims, and take over those of a driver that has died."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patchsae_ray import storage
from patchsae_ray.pipelines import claims, heartbeat
from patchsae_ray.pipelines.claims import Claims, Desk, block_size, claim_name, claim_of
from patchsae_ray.pipelines.heartbeat import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS, Heartbeat, Peers, heartbeat_name
from patchsae_ray.writing import create, write_bytes


class Driver:
    """A driver as far as claims go, with a clock and a heartbeat that the test moves."""

    def __init__(self, folder: Path, name: str, units: int) -> None:
        self.folder, self.name, self.units = str(folder), name, units
        self.now, self.beats = 0.0, 0
        self.peers = Peers(self.folder, lambda: self.now)
        self.claims = Claims(self.folder, units, name, self.peers)
        self.beat()

    def beat(self) -> None:
        self.beats += 1
        said = {"host": f"host-of-{self.name}", "pid": 1, "machine": "", "beats": self.beats}
        write_bytes(storage.join(self.folder, heartbeat_name(self.name)), json.dumps(said).encode())

    def look(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.claims.look(storage.entries(self.folder))

    def desk(self) -> Desk:
        self.look()
        return self.claims.desk()


@pytest.mark.parametrize("units", [1, 5, 300, 2503, 2_000_000])
def test_a_wave_is_a_few_claims_and_a_small_data_set_many(units: int) -> None:
    size = block_size(units)
    assert -(-units // size) <= 500
    assert size == 1 or 20_000 / size > 4
    assert units > 256 or size == 1


def test_a_claim_is_known_by_its_name() -> None:
    assert claim_of(claim_name(12, 3)) == (12, 3)
    assert [claim_of(name) for name in ("alive-1.json", "claim-x.1", "claim-000001", "0000000001.1.bundle")] == [None] * 4


@pytest.mark.parametrize("units", [5, 1000])
def test_two_drivers_that_start_together_share_the_units(tmp_path: Path, units: int) -> None:
    desks = [Driver(tmp_path, name, units).desk() for name in "ab"]
    done: dict[int, list[int]] = {0: [], 1: []}
    queues = [list(range(units)), list(range(units))]
    while any(queues):  # the second is twice as fast
        for index in (0, 1, 1):
            while queues[index]:
                unit = queues[index].pop(0)
                if desks[index].claim(unit):
                    done[index].append(unit)
                    break
    assert sorted(done[0] + done[1]) == list(range(units))
    assert min(len(one) for one in done.values()) >= units // 4


def test_what_another_holds_is_not_tried_and_the_rest_begins_elsewhere(tmp_path: Path) -> None:
    first, second = Driver(tmp_path, "a", 1000), Driver(tmp_path, "b", 1000)
    desk = first.desk()
    assert [desk.claim(unit) for unit in (0, 1, 999)] == [True] * 3
    second.look()
    mine, held = second.claims.split(range(1000))
    assert sorted(mine) == list(range(4, 996))
    assert (held.units, held.hosts) == (8, ("host-of-a",))
    assert not second.claims.desk().claim(1)


def test_a_driver_whose_heartbeat_stops_is_taken_over_once(tmp_path: Path) -> None:
    dead, *others = (Driver(tmp_path, name, 5) for name in "abc")
    desk = dead.desk()
    assert all(desk.claim(unit) for unit in range(5))
    for _ in range(int(DEAD_AFTER_SECONDS / HEARTBEAT_SECONDS) + 1):
        for one in others:
            assert one.claims.split(range(5))[0] in ([], list(range(5)))
            one.look(HEARTBEAT_SECONDS)
            one.beat()
    assert all(sorted(one.claims.split(range(5))[0]) == list(range(5)) for one in others)
    desks = [one.claims.desk() for one in others]
    taken = [[unit for unit in range(5) if desks[unit % 2].claim(unit) or desks[1 - unit % 2].claim(unit)]]
    assert taken == [list(range(5))]
    assert desks[0].mine == {0, 2, 4}
    assert desks[1].mine == {1, 3}
    assert all(desk.claim(unit) for unit in range(5)), "the one that was thought dead goes on, and bundles tell"


def test_a_driver_that_beats_lives_however_long_it_takes(tmp_path: Path) -> None:
    busy, other = Driver(tmp_path, "a", 5), Driver(tmp_path, "b", 5)
    desk = busy.desk()
    assert desk.claim(2)
    for _ in range(100):
        busy.beat()
        other.look(HEARTBEAT_SECONDS)
    assert other.claims.split(range(5))[1].units == 1


def test_time_in_which_nobody_looked_kills_nobody(tmp_path: Path) -> None:
    busy, other = Driver(tmp_path, "a", 5), Driver(tmp_path, "b", 5)
    desk = busy.desk()
    assert desk.claim(2)
    other.look()
    other.look(10 * DEAD_AFTER_SECONDS)  # the store was away, for the heartbeat too
    assert other.claims.split(range(5))[1].units == 1


def test_a_driver_that_has_left_is_taken_over_at_the_second_look(tmp_path: Path) -> None:
    gone, other = Driver(tmp_path, "a", 5), Driver(tmp_path, "b", 5)
    desk = gone.desk()
    assert desk.claim(2)
    (tmp_path / heartbeat_name("a")).unlink()
    other.look()
    assert other.claims.split(range(5))[1].units == 1
    other.look()
    assert other.claims.split(range(5))[1].units == 0
    assert other.claims.desk().claim(2)


def test_a_process_of_this_machine_that_has_ended_is_dead_at_once(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom patchsae_ray.pipelines.heartbeat import Heartbeat\n"
        "heart = Heartbeat(sys.argv[1])\nheart.__enter__()\nprint(heart.driver, flush=True)\nos._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    driver = done.stdout.strip()
    peers = Peers(str(tmp_path))
    with Heartbeat(str(tmp_path)) as mine:
        peers.look(storage.entries(str(tmp_path)))
        assert not peers.alive(driver)
        assert peers.alive(mine.driver)
        assert peers.others() == [mine.driver]
    assert [path.name for path in tmp_path.iterdir()] == [heartbeat_name(driver)]


def test_a_heartbeat_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.01)
    with Heartbeat(str(tmp_path)) as mine:
        path = tmp_path / heartbeat_name(mine.driver)
        while json.loads(path.read_text())["beats"] < 3:
            pass
    assert not path.exists()


def test_a_claim_whose_answer_was_lost_is_still_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Driver(tmp_path, "a", 5).desk()

    def lost(uri: str, data: bytes) -> bool:
        create(uri, data)
        return False

    monkeypatch.setattr(claims, "create", lost)
    assert desk.claim(3)


def test_a_damaged_claim_is_nobodys(tmp_path: Path) -> None:
    one = Driver(tmp_path, "a", 5)
    (tmp_path / claim_name(3, 0)).write_bytes(b"{")
    one.look()
    one.look()
    assert one.claims.desk().claim(3)
    assert (tmp_path / claim_name(3, 1)).exists()
