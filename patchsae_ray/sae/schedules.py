"""Learning-rate schedules by PatchSAE's names, as a factor of `lr` for every step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from patchsae_ray.names import Schedules


@dataclass(frozen=True)
class Schedule:
    """A schedule over `total_steps`, counted from step 0.

    - constant: 1.
    - constantwithwarmup: min(1, (step + 1) / warm_up_steps).
    - linearwarmupdecay: the same rise, then a straight line to 0 at the end.
    - cosineannealing: half a cosine from 1 to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983).
    - cosineannealingwarmup: the rise, then half a cosine to 0.
    - cosineannealingwarmrestarts: half cosines from 1 to 0, `restarts` + 1 of equal length.
    """

    name: Schedules
    total_steps: int
    warm_up_steps: int = 500
    restarts: int = 3

    def factor(self, step: int) -> float:
        """Factor of the base learning rate at `step`."""
        return _FACTORS[self.name](self, step)


def _rise(schedule: Schedule, step: int) -> float:
    return min(1.0, (step + 1) / schedule.warm_up_steps) if schedule.warm_up_steps > 0 else 1.0


def _after_rise(schedule: Schedule, step: int) -> float:
    """Share of the way from the end of the rise to `total_steps`, 0 to 1; below 1 in every step of the run."""
    length = max(1, schedule.total_steps - schedule.warm_up_steps)
    return min(1.0, max(0, step - schedule.warm_up_steps) / length)


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _restarting(schedule: Schedule, step: int) -> float:
    length = max(1, math.ceil(schedule.total_steps / (schedule.restarts + 1)))
    return _half_cosine((step % length) / length)


_FACTORS: dict[Schedules, Callable[[Schedule, int], float]] = {
    "constant": lambda schedule, step: 1.0,
    "constantwithwarmup": _rise,
    "linearwarmupdecay": lambda schedule, step: _rise(schedule, step) * (1.0 - _after_rise(schedule, step)),
    "cosineannealing": lambda schedule, step: _half_cosine(min(1.0, step / max(1, schedule.total_steps))),
    "cosineannealingwarmup": lambda schedule, step: _rise(schedule, step) * _half_cosine(_after_rise(schedule, step)),
    "cosineannealingwarmrestarts": _restarting,
}
