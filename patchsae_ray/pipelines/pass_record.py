"""What every pass over a data set keeps beside its own results: images, unreadable ones, times."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from patchsae_ray.errors import UserError
from patchsae_ray.measure.stages import peak_bytes
from patchsae_ray.pipelines.bundles import BadRow, BadRows, Bundle, Notes, bundle_name
from patchsae_ray.pipelines.merging import Receipt


@dataclass
class BadTally:
    """How many images are unreadable as far as it is known, by unit; their rows stay in the bundles until the end."""

    _counts: dict[int, int] = field(default_factory=dict)
    _first: BadRow | None = None
    total: int = 0

    def add(self, unit: int, count: int, first: BadRow) -> None:
        """A unit has so many, and which is its first; one that is run again counts once."""
        self.total += count - self._counts.get(unit, 0)
        self._counts[unit] = count
        self._first = first if self._first is None else min(first, self._first)

    def forget(self, unit: int) -> None:
        """Another driver has read the unit after all."""
        self.total -= self._counts.pop(unit, 0)

    @property
    def first(self) -> BadRow:
        """The one of the lowest position.

        Raises: ValueError where there is none.
        """
        if self._first is None:
            raise ValueError("no image is unreadable")
        return self._first


@dataclass
class Pass:
    """What every pass over a data set keeps beside its own results."""

    max_bad_fraction: float
    num_images: int
    num_units: int = 0
    bundles: str = ""
    """URI of the folder of its bundles."""
    units_before: int = 0
    """Units that earlier runs had committed."""
    images_here: int = 0
    """Images of the units that this driver has run and committed."""
    notes: Notes = field(default_factory=lambda: Notes([], 0))
    failed: BadRows = field(default_factory=list)
    """The images of units that were given up."""
    commit_seconds: float = 0.0
    """Of this run's bundles; the other stages are those of all runs together."""
    merge_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    tally: BadTally = field(default_factory=BadTally)
    """Of the unreadable images of this run, while it goes on."""
    committed: dict[str, Bundle] = field(default_factory=dict)
    """This run's bundles, whether or not a listing shows them yet."""
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """[unit] whether it is in one of them."""

    def __post_init__(self) -> None:
        self.own = np.zeros(self.num_units, dtype=bool)

    def take(self, receipt: Receipt) -> None:
        """A bundle was committed.

        Raises: UserError as `check`.
        """
        if receipt.committed:
            name = bundle_name(receipt.committed)
            self.committed[name] = Bundle(name, receipt.committed)
            self.own[list(receipt.committed)] = True
        self.images_here += receipt.images
        self.commit_seconds += receipt.commit_seconds
        for unit, count, first in receipt.bad:
            self.tally.add(unit, count, first)
        self._refuse(self.tally.total, lambda: self.tally.first)

    def forget(self, name: str, images: int) -> None:
        """A bundle that was committed is gone, with so many images; it may have been another driver's."""
        bundle = self.committed.pop(name, None)
        if bundle is not None:
            self.own[list(bundle.units)] = False
            self.images_here -= images

    @property
    def bad(self) -> BadRows:
        """All images without a result, by position."""
        return sorted([*self.notes.bad, *self.failed])

    def check(self) -> None:
        """See that no more images are unreadable than the settings allow, once all bundles are merged.

        Raises: UserError.
        """
        self._refuse(len(self.notes.bad) + len(self.failed), lambda: self.bad[0])

    def _refuse(self, count: int, first: Any) -> None:
        if count > self.max_bad_fraction * self.num_images:
            _, path, reason = first()
            raise UserError(
                f"{count} of {self.num_images} images cannot be read, the first {path} ({reason}); "
                f"--max_bad_fraction {self.max_bad_fraction:g} allows {int(self.max_bad_fraction * self.num_images)}"
            )

    def record(self) -> dict[str, Any]:
        """What run.json says of any pass."""
        return {
            "num_images": self.num_images,
            "num_units": self.num_units,
            "units_by_earlier_runs": self.units_before,
            "images_by_this_run": self.images_here,
            "bad_images": len(self.notes.bad) + len(self.failed),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds().items()},
            "wall_seconds": round(self.wall_seconds(), 3),
            "devices": self.notes.devices,
            "peak_memory_bytes": {"actor": self.notes.peak_bytes, "driver": peak_bytes()},
        }

    def images_per_second(self) -> float:
        """Of the images that this run did itself."""
        return self.images_here / self.wall_seconds()

    def seconds(self) -> dict[str, float]:
        """Stage times, over all actors and tasks."""
        return {**self.notes.seconds, "commit": self.commit_seconds, "merge": self.merge_seconds}

    def wall_seconds(self) -> float:
        """Seconds since the pass began."""
        return time.perf_counter() - self.started
