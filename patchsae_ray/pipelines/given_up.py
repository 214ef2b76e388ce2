"""Units that were given up, written down for the other drivers of a run: else each would wait for the other to do its own.

A driver makes `failed-{unit}.{driver}.json` once, in the bundles' folder, and nothing in it changes. It counts for the
drivers that are at work with the one that wrote it; a later run of the same command tries the unit again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.heartbeat import Peers
from patchsae_ray.storage import Entry
from patchsae_ray.writing import create

PREFIX = "failed-"
SUFFIX = ".json"


def failed_name(unit: int, driver: str) -> str:
    """The file that says that a driver has given a unit up."""
    return f"{PREFIX}{unit:010d}.{driver}{SUFFIX}"


def failed_of(name: str) -> tuple[int, str] | None:
    """(unit, driver) of such a file; None for another file."""
    unit, dot, driver = name.removeprefix(PREFIX).removesuffix(SUFFIX).partition(".")
    ours = name.startswith(PREFIX) and name.endswith(SUFFIX) and dot and unit.isdecimal()
    return (int(unit), driver) if ours else None


@dataclass
class GivenUp:
    """What a driver knows of the units that others have given up.

    A file that was there before this driver's first look may be a dead run's: it counts once its driver has been seen to
    live. Until then the unit is held by that driver's claim, so that this one waits for one or the other.

    Args:
        folder: of the bundles.
        driver: this one.
        peers: the others, as they look at the same listings.
    """

    folder: str
    driver: str
    peers: Peers
    _before: set[str] | None = None
    """Files of the first look."""
    _counted: dict[str, tuple[int, str]] = field(default_factory=dict)
    """File → (unit, reason)."""

    def write(self, unit: int, reason: str) -> None:
        """Tell the others that this driver gives a unit up.

        Raises: StoreError where the store stays away for longer than its patience.
        """
        uri = storage.join(self.folder, failed_name(unit, self.driver))
        storage.patiently(lambda: create(uri, json.dumps({"reason": reason}).encode()))

    def look(self, entries: Sequence[Entry]) -> dict[int, str]:
        """Take in a listing of the folder, after the peers have. Returns unit → why another driver has given it up.

        Raises: as `write`.
        """
        there = {entry.path: found for entry in entries if (found := failed_of(entry.path)) and found[1] != self.driver}
        if self._before is None:
            self._before = set(there)
        unread = [
            name
            for name, (_, driver) in there.items()
            if name not in self._counted and (name not in self._before or self.peers.beats(driver))
        ]
        uris = [storage.join(self.folder, name) for name in unread]
        for name, said in zip(unread, storage.patiently(lambda: storage.read_many(uris)), strict=True):
            if not isinstance(said, UserError):  # else it has just been removed
                self._counted[name] = (there[name][0], _reason_in(said))
        return dict(self._counted.values())


def _reason_in(data: bytes) -> str:
    try:
        return str(json.loads(data)["reason"])
    except (ValueError, KeyError, TypeError):
        return "another driver has given its unit up"
