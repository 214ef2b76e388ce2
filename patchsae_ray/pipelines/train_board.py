"""What training workers tell the driver, and what it tells them: an actor on Ray, a plain object in one process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from patchsae_ray.pipelines.bundles import BadRows
from patchsae_ray.pipelines.progress import Attempts
from patchsae_ray.pipelines.resume import Kind


@dataclass(frozen=True)
class Message:
    """From one worker to the driver."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on, over all workers and from the start."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the steps since the last message with some."""
    bad: BadRows = field(default_factory=list)
    """Unreadable images that this worker met since its last message."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage times since its last message."""
    peak_bytes: int = 0
    """Peak resident memory of the worker."""
    device: str = ""
    """Model of the device that the worker computes on."""
    most_tokens: int = 0
    """Most tokens that the worker's buffer has held."""
    saved: Kind | None = None
    """What was just written: a checkpoint to go on from, or the weights alone."""
    warning: str = ""
    """A line for the log."""
    resumed: bool = False
    """The worker goes on from the checkpoint of `step`."""


class TrainBoard(Attempts):
    """Messages that the driver has not taken yet, and why the run must stop, if it must.

    Args:
        num_images: of the data set.
        max_bad_fraction: share of them that may be unreadable.
    """

    def __init__(self, num_images: int, max_bad_fraction: float) -> None:
        super().__init__()
        self._messages: list[Message] = []
        self._bad: dict[int, tuple[str, str]] = {}
        self._num_images, self._max_bad = num_images, max_bad_fraction
        self._stopped = ""

    def post(self, message: Message) -> None:
        """Leave a message."""
        self._messages.append(message)
        self._bad.update({position: (path, reason) for position, path, reason in message.bad})
        if len(self._bad) > self._max_bad * self._num_images:
            position = min(self._bad)
            path, reason = self._bad[position]
            self.stop(
                f"{len(self._bad)} of {self._num_images} images cannot be read, the first {path} ({reason}); "
                f"--max_bad_fraction {self._max_bad:g} allows {int(self._max_bad * self._num_images)}"
            )

    def take(self) -> list[Message]:
        """All messages since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def stop(self, reason: str) -> None:
        """The run must stop; the first reason stays."""
        self._stopped = self._stopped or reason

    def stopped(self) -> str:
        """Why the run must stop; empty where it may go on."""
        return self._stopped

    def bad(self) -> BadRows:
        """All unreadable images met, by position."""
        return [(position, *self._bad[position]) for position in sorted(self._bad)]


class Board(Protocol):
    """A worker's side of the board."""

    def post(self, message: Message) -> None:
        """Leave a message, without waiting."""
        ...

    def stop(self, reason: str) -> None:
        """The run must stop."""
        ...

    def stopped(self) -> str:
        """Why the run must stop; empty where it may go on."""
        ...


@dataclass(frozen=True)
class RemoteBoard:
    """The board where it is an actor."""

    actor: Any

    def post(self, message: Message) -> None:
        self.actor.post.remote(message)

    def stop(self, reason: str) -> None:
        ray.get(self.actor.stop.remote(reason))

    def stopped(self) -> str:
        return str(ray.get(self.actor.stopped.remote()))
