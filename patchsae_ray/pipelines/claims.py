"""Claims: which driver runs which units, so that several drivers of one run share its units.

Units are claimed in blocks, by files that are made once and never change: `claim-{block}.{turn}`, which name the driver. The
first turn is 0; where a driver has died, whoever makes the next turn has its block. Nothing depends on a claim but who does
the work: a driver that was thought dead goes on, bundles commit once, and units that were run twice are chosen once.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.heartbeat import Peers
from patchsae_ray.storage import Entry
from patchsae_ray.writing import create

PREFIX = "claim-"
BLOCKS = 256
"""Blocks of a data set, about: what the last driver is still at when the others have nothing left is one of them."""
MOST_UNITS = 4096
"""Units of a block, at most: a wave of a large data set is a few blocks."""


def block_size(units: int) -> int:
    """Units of each block of a data set; the same for every driver."""
    return max(1, min(MOST_UNITS, math.ceil(units / BLOCKS)))


def claim_name(block: int, turn: int) -> str:
    """The file that holds a claim."""
    return f"{PREFIX}{block:06d}.{turn}"


def claim_of(name: str) -> tuple[int, int] | None:
    """(block, turn) of a claim's file; None for another file."""
    block, dot, turn = name.removeprefix(PREFIX).partition(".")
    ours = name.startswith(PREFIX) and dot and block.isdecimal() and turn.isdecimal()
    return (int(block), int(turn)) if ours else None


def _driver_in(data: bytes) -> str:
    try:
        return str(json.loads(data)["driver"])
    except (ValueError, KeyError, TypeError):
        return ""


@dataclass
class Desk:
    """Claims blocks when the first of their units is about to be run.

    Args:
        folder: of the bundles.
        driver: whose claims these are.
        size: units of a block.
        turns: of blocks that were a dead driver's, the turn to make; of others it is the first.
        held: blocks that others hold.
        mine: blocks that are this driver's.
    """

    folder: str
    driver: str
    size: int
    turns: Mapping[int, int] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    mine: set[int] = field(default_factory=set)

    def claim(self, unit: int) -> bool:
        """Whether this driver may run a unit: its block is this driver's, or nobody else's and now is.

        Raises: StoreError where the store stays away for longer than its patience.
        """
        block = unit // self.size
        if block not in self.mine and block not in self.held:
            (self.mine if self._make(block) else self.held).add(block)
        return block in self.mine

    def _make(self, block: int) -> bool:
        uri = storage.join(self.folder, claim_name(block, self.turns.get(block, 0)))
        said = json.dumps({"driver": self.driver}).encode()
        if storage.patiently(lambda: create(uri, said)):
            return True
        return _driver_in(storage.patiently(lambda: storage.read_bytes(uri))) == self.driver  # an answer was lost


@dataclass(frozen=True)
class Held:
    """Units that other drivers, who live, have claimed."""

    units: int
    hosts: tuple[str, ...]


class Claims:
    """What a driver knows of the claims on a folder.

    Args:
        folder: of the bundles.
        units: of the data set.
        driver: this one.
        peers: the others.
    """

    def __init__(self, folder: str, units: int, driver: str, peers: Peers) -> None:
        self._folder, self._size, self._driver, self._peers = folder, block_size(units), driver, peers
        self._turns: dict[int, int] = {}
        self._owners: dict[tuple[int, int], str] = {}

    def look(self, entries: Sequence[Entry]) -> None:
        """Take in a listing of the folder: claims made since the last, and heartbeats.

        Raises: StoreError where the store stays away for longer than its patience.
        """
        there = [claim for entry in entries if (claim := claim_of(entry.path)) is not None]
        unread = [claim for claim in there if claim not in self._owners]
        uris = [storage.join(self._folder, claim_name(*claim)) for claim in unread]
        for claim, found in zip(unread, storage.patiently(lambda: storage.read_many(uris)), strict=True):
            if not isinstance(found, UserError):  # else it has just been removed
                self._owners[claim] = _driver_in(found)
        self._turns = {}
        for block, turn in there:
            if (block, turn) in self._owners:
                self._turns[block] = max(turn, self._turns.get(block, 0))
        owners = {self._owners[claim] for claim in self._turns.items()}
        self._peers.look(entries, owners - {self._driver})

    def split(self, missing: Sequence[int]) -> tuple[list[int], Held]:
        """Units that this driver may run, in the order to try them, and what others hold of the missing ones.

        Where others are at work it begins at a block of its own choice, so that few units are tried in vain.

        Args:
            missing: ascending.
        """
        units = np.asarray(missing, dtype=np.int64)
        blocks = units // self._size
        held = np.isin(blocks, sorted(self._held()))
        mine, at = units[~held], blocks[~held]
        if len(mine) and any(driver != self._driver for driver in self._peers.others()):
            start = int(np.searchsorted(at, random.choice(np.unique(at))))
            mine = np.roll(mine, -start)
        owners = sorted({self._owner(block) for block in np.unique(blocks[held]).tolist()})
        hosts = tuple(dict.fromkeys(self._peers.host(owner) for owner in owners))
        return mine.tolist(), Held(int(held.sum()), hosts)

    def desk(self) -> Desk:
        """For the process that claims blocks: what nobody holds, or a driver that has died."""
        held = self._held()
        mine = {block for block in self._turns if self._owner(block) == self._driver}
        turns = {block: turn + 1 for block, turn in self._turns.items() if block not in held and block not in mine}
        return Desk(self._folder, self._driver, self._size, turns, held, mine)

    def _owner(self, block: int) -> str:
        return self._owners[(block, self._turns[block])]

    def _held(self) -> set[int]:
        """Blocks of other drivers who live."""
        owners = {block: self._owner(block) for block in self._turns}
        living = {owner for owner in set(owners.values()) if owner != self._driver and self._peers.alive(owner)}
        return {block for block, owner in owners.items() if owner in living}
