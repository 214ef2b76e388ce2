"""Bundles: the combined results of up to 32 units, committed once under a name that says which units they are.

Several drivers, retries and earlier runs may commit bundles of the same run key into one folder. A name is made of its
units alone, so the first commit wins and a listing tells what is done without opening anything. Bundles may overlap; a
choice of disjoint ones is made at the end, and what it leaves uncovered is run.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import Arrays, from_bytes, to_bytes
from patchsae_ray.storage import Entry
from patchsae_ray.writing import create

MAX_UNITS = 32
SUFFIX = ".bundle"
_MAGIC = b"PSAEBND1"

BadRow = tuple[int, str, str]
"""(position, path, reason)."""
BadRows = list[BadRow]


@dataclass
class Notes:
    """What a unit or a bundle says beside its arrays."""

    units: list[int]
    images: int
    """Images read, unreadable ones not among them."""
    bad: BadRows = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage times."""
    peak_bytes: int = 0
    """Peak resident memory of the actors so far."""
    failed: str = ""
    """Why the unit was given up; such a unit is in no bundle."""
    devices: list[str] = field(default_factory=list)
    """Models of device that computed it, by name; empty where it was made before they were on record."""

    def add(self, other: "Notes") -> None:
        """Take in another's units."""
        self.units = sorted([*self.units, *other.units])
        self.images += other.images
        self.bad = sorted([*self.bad, *other.bad])
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.devices = sorted({*self.devices, *other.devices})
        for stage, seconds in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class Bundle:
    """A committed bundle, as its name says."""

    name: str
    units: tuple[int, ...]


def bundle_name(units: Iterable[int]) -> str:
    """`{first unit}.{gaps between the units, base 36}`: sorts by the first unit, and holds them all."""
    ordered = sorted(units)
    gaps = "-".join(np.base_repr(after - before, 36).lower() for before, after in pairwise(ordered))
    return f"{ordered[0]:010d}.{gaps}{SUFFIX}"


def bundle_units(name: str) -> tuple[int, ...] | None:
    """The units of a bundle by its name; None for the name of something else."""
    first, dot, gaps = name.removesuffix(SUFFIX).partition(".")
    if not name.endswith(SUFFIX) or not dot or not first.isdecimal():
        return None
    units = [int(first)]
    try:
        for gap in gaps.split("-") if gaps else []:
            units.append(units[-1] + int(gap, 36))
    except ValueError:
        return None
    return tuple(units)


def choose(bundles: Iterable[Bundle]) -> list[Bundle]:
    """Bundles that share no unit, in the order of their first units.

    Larger ones are taken first, so that little is left to be run again; equally large ones by name. Any driver that sees
    the same names chooses the same.
    """
    taken: set[int] = set()
    chosen = []
    for bundle in sorted(bundles, key=lambda one: (-len(one.units), one.name)):
        if taken.isdisjoint(bundle.units):
            taken.update(bundle.units)
            chosen.append(bundle)
    return sorted(chosen, key=lambda one: one.units)


def pack(arrays: Arrays, notes: Notes) -> bytes:
    """Arrays and notes as one block of bytes: safetensors, no pickle."""
    said = json.dumps(asdict(notes)).encode()
    return to_bytes({**arrays, "notes": np.frombuffer(said, dtype=np.uint8)})


def unpack(data: bytes) -> tuple[Arrays, Notes]:
    """The reverse of `pack`."""
    arrays = from_bytes(data)
    said = json.loads(arrays.pop("notes").tobytes())
    said["bad"] = [(int(position), str(path), str(reason)) for position, path, reason in said["bad"]]
    return arrays, Notes(**said)


@dataclass(frozen=True)
class BundleFolder:
    """The bundles of one run key.

    Args:
        uri: `{results folder}/bundles/{run key}`.
        units: of the data set; a bundle with others is not this run's.
    """

    uri: str
    units: int

    def entries(self) -> "list[Entry]":
        """All files of the folder: bundles, and the claims and heartbeats of its drivers.

        Raises: StoreError where the store stays away for longer than its patience.
        """
        return storage.patiently(lambda: storage.entries(self.uri))

    def list(self, entries: Sequence[Entry] | None = None) -> "list[Bundle]":
        """What is committed, as far as it belongs to this run.

        Args:
            entries: of the folder, where they have been asked for already.

        Raises: as `entries`.
        """
        found = []
        for entry in self.entries() if entries is None else entries:
            units = bundle_units(entry.path)
            if units is not None and units[-1] < self.units:
                found.append(Bundle(entry.path, units))
        return found

    def commit(self, arrays: Arrays, notes: Notes) -> tuple[bool, int]:
        """Commit a bundle. Returns (whether this call did it, bytes); a bundle of the same units that is there stays.

        Raises: StoreError where the store stays away for longer than its patience.
        """
        plain = pack(arrays, notes)
        data = _MAGIC + len(plain).to_bytes(8, "little") + pa.Codec("zstd").compress(plain, asbytes=True)
        uri = storage.join(self.uri, bundle_name(notes.units))
        return storage.patiently(lambda: create(uri, data)), len(data)

    def read(self, bundle: Bundle) -> tuple[Arrays, Notes]:
        """A bundle's content.

        Raises: UserError where it is gone or damaged.
        """
        uri = storage.join(self.uri, bundle.name)
        data = storage.patiently(lambda: storage.read_bytes(uri))
        try:
            if data[:8] != _MAGIC:
                raise ValueError("not a bundle")
            size = int.from_bytes(data[8:16], "little")
            arrays, notes = unpack(pa.Codec("zstd").decompress(data[16:], decompressed_size=size, asbytes=True))
        except Exception as error:  # bytes from a store: each layer raises its own kind
            raise UserError(f"{uri} is damaged: remove it, and the same command makes it again") from error
        if tuple(notes.units) != bundle.units:
            raise UserError(f"{uri} does not hold the units of its name: remove it, and the same command makes it again")
        return arrays, notes


def uncovered(bundles: Sequence[Bundle], units: int) -> np.ndarray:
    """Ascending indices of the units that are in none of the bundles."""
    missing = np.ones(units, dtype=bool)
    for bundle in bundles:
        missing[list(bundle.units)] = False
    return np.flatnonzero(missing)
