"""Heartbeats: how a driver shows that it lives, and how others see it without comparing clocks."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.storage import Entry
from patchsae_ray.writing import remove, write_bytes

ALIVE_PREFIX = "alive-"
SUFFIX = ".json"
HEARTBEAT_SECONDS = 10.0
"""Between two beats."""
DEAD_AFTER_SECONDS = 60.0
"""Without a beat for this long, by the observer's own clock, a driver is dead."""
LOOK_SECONDS = 1.0
"""Between two looks at a folder that a driver may be at work in."""
ABSENT_LOOKS = 2
"""Successive looks at a folder in which a driver's heartbeat is missing; one may have been a listing in several pages."""


def heartbeat_name(driver: str) -> str:
    """The file of a driver's heartbeat, in the folder that it works on."""
    return f"{ALIVE_PREFIX}{driver}{SUFFIX}"


def driver_of(name: str) -> str | None:
    """The driver whose heartbeat a file is; None for another file."""
    ours = name.startswith(ALIVE_PREFIX) and name.endswith(SUFFIX)
    return name.removeprefix(ALIVE_PREFIX).removesuffix(SUFFIX) if ours else None


class Heartbeat:
    """A small file that is rewritten by a thread while the `with` block runs, whatever else the driver is at.

    Args:
        folder: what the driver works on.
    """

    def __init__(self, folder: str) -> None:
        self.driver = secrets.token_hex(4)
        self._uri = storage.join(folder, heartbeat_name(self.driver))
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The driver is done; where the store does not answer, the file grows old by itself."""
        self._stop.set()
        self._thread.join(timeout=HEARTBEAT_SECONDS)
        try:
            remove(self._uri)
        except UserError:
            return

    def _go_on(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        """Say that the driver lives. A store that does not answer, or refuses, is left to those who need it."""
        self._beats += 1
        try:
            write_bytes(self._uri, json.dumps({**_this_process(), "beats": self._beats, "time": time.time()}).encode())
        except UserError:
            return


class Peers:
    """Which other drivers of a folder live, as their heartbeats show it in successive looks.

    A heartbeat is judged by whether its file has changed over this process's own time, so that no clock is compared with
    another. Time in which nobody looked counts as one beat at most: the store may have been away, for them too.

    Args:
        folder: what the drivers work on.
        clock: seconds, of this process.
    """

    def __init__(self, folder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._versions: dict[str, str] = {}
        self._silent: dict[str, float] = {}
        self._absent: dict[str, int] = {}
        self._beating: set[str] = set()
        self._hosts: dict[str, str] = {}
        self._pids: dict[str, int] = {}
        self._looked: float | None = None

    def look(self, entries: Sequence[Entry], claimants: Iterable[str] = ()) -> None:
        """Take in a listing of the folder.

        Args:
            entries: the listing.
            claimants: drivers that are known from elsewhere, which should have a heartbeat.
        """
        now = self._clock()
        passed = 0.0 if self._looked is None else min(now - self._looked, HEARTBEAT_SECONDS)
        self._looked = now
        found = {driver: entry.version for entry in entries if (driver := driver_of(entry.path)) is not None}
        for driver, version in found.items():
            same = self._versions.get(driver) == version
            self._silent[driver] = self._silent.get(driver, 0.0) + passed if same else 0.0
            if driver in self._versions and not same:
                self._beating.add(driver)
            self._versions[driver] = version
            self._absent[driver] = 0
            if driver not in self._hosts:
                self._meet(driver)
        for driver in {*self._versions, *claimants} - set(found):
            self._absent[driver] = self._absent.get(driver, 0) + 1

    def alive(self, driver: str) -> bool:
        """Whether a driver lives, as far as the looks so far can tell."""
        silent = self._silent.get(driver, 0.0) >= DEAD_AFTER_SECONDS
        ended = driver in self._pids and not Path(f"/proc/{self._pids[driver]}").exists()
        return not silent and not ended and self._absent.get(driver, 0) < ABSENT_LOOKS

    def beats(self, driver: str) -> bool:
        """Whether a driver has been seen to live: its heartbeat has changed between two looks."""
        return driver in self._beating

    def others(self) -> list[str]:
        """Drivers that live."""
        return [driver for driver in self._versions if self.alive(driver)]

    def host(self, driver: str) -> str:
        """The machine of a driver, as it says itself."""
        return self._hosts.get(driver) or "another machine"

    def _meet(self, driver: str) -> None:
        """Read who a driver is; one whose process is on this machine is known to be dead as soon as that has ended."""
        try:
            said: dict[str, Any] = json.loads(storage.read_bytes(storage.join(self._folder, heartbeat_name(driver))))
            self._hosts[driver] = str(said["host"])
            if said["machine"] and said["machine"] == _machine():
                self._pids[driver] = int(said["pid"])
        except (UserError, ValueError, KeyError, TypeError):
            return


def check_nobody_works(root: str) -> None:
    """See that no living driver is at work in a folder, or one below it, whose files are about to be removed.

    A heartbeat that does not say whether its driver lives is watched until it beats, or has been silent for too long.

    Raises: UserError that names the driver's machine; StoreError once the store has stayed away for too long.
    """
    there = storage.patiently(lambda: storage.entries(root))
    inside = {entry.path.rpartition("/")[0] for entry in there if driver_of(entry.path.rpartition("/")[2]) is not None}
    for folder in sorted(storage.join(root, name) for name in inside):
        _check_nobody_in(folder)


def _check_nobody_in(folder: str) -> None:
    peers, first = Peers(folder), None
    while True:
        found = storage.patiently(lambda: storage.entries(folder))
        peers.look(found)
        others = peers.others()
        if not others:
            return
        beats = {entry.path: entry.version for entry in found if driver_of(entry.path) in others}
        first = first or beats
        if any(first.get(path) != version for path, version in beats.items()):
            raise UserError(
                f"{folder}: a driver on {peers.host(others[0])} is at work there; --overwrite would take its files away, so "
                "end it first, or write elsewhere"
            )
        time.sleep(LOOK_SECONDS)


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}


def _machine() -> str:
    """Within what a process id means one process: the running system and its namespace; empty where it cannot be told."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{booted}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""
