"""What the driver makes of the workers' messages: lines, MLflow metrics, the record of the run."""

import logging
import time
from collections.abc import Callable
from typing import Any

from patchsae_ray.data.chunks import LaneOrder
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.pipelines.devices import warn_of_several
from patchsae_ray.pipelines.passes import Pass
from patchsae_ray.pipelines.progress import LINE_SECONDS, progress_line
from patchsae_ray.pipelines.resume import ResumeFolder
from patchsae_ray.pipelines.train_board import Message
from patchsae_ray.tracking import Tracker

log = logging.getLogger(__name__)


class TrainListener:
    """Hears the messages of one run.

    Args:
        order: of the run.
        tracker: gets the metrics, as `train_…`.
        manifest: the images.
        max_bad_fraction: for the record.
        resume: where the list of unreadable images is kept for a later driver.
        written: told the step of weights that were just written.
    """

    def __init__(
        self,
        order: LaneOrder,
        tracker: Tracker,
        manifest: Manifest,
        max_bad_fraction: float,
        resume: ResumeFolder,
        written: Callable[[int], None],
    ) -> None:
        self._order, self._tracker, self._resume, self._written = order, tracker, resume, written
        self.kept = Pass(max_bad_fraction, manifest.num_images, len(manifest.units))
        self.kept.notes.bad = resume.bad()
        self.weights: set[int] = set()
        """Steps whose weights were heard to be written."""
        self.resumed_from = 0
        """Step of the checkpoint that this driver's run began at."""
        self._metrics: dict[str, float] = {}
        self._step = self._tokens = self._most_tokens = 0
        self._first = 0
        """Tokens that were trained on before this driver's run."""
        self._began: tuple[float, int] | None = None
        self._last_line = time.monotonic()

    def hear(self, message: Message) -> None:
        """Take in a message."""
        notes = self.kept.notes
        if set(message.bad) - set(notes.bad):
            notes.bad = sorted({*notes.bad, *message.bad})
            self._resume.keep_bad(notes.bad)
        notes.peak_bytes = max(notes.peak_bytes, message.peak_bytes)
        self._most_tokens = max(self._most_tokens, message.most_tokens)
        if message.device and message.device not in notes.devices:
            notes.devices = sorted([*notes.devices, message.device])
            warn_of_several("train", notes.devices)
        for stage, seconds in message.seconds.items():
            notes.seconds[stage] = notes.seconds.get(stage, 0.0) + seconds
        if message.warning:
            log.warning("train: %s", message.warning)
        if message.resumed:
            log.info("train: goes on from the checkpoint of step %s", f"{message.step:,}")
            if self._began is None:
                self.resumed_from, self._first = message.step, message.tokens
            self._step, self._tokens = message.step, message.tokens
            self._began = (time.monotonic(), message.tokens)
        if message.saved == "weights":
            self.weights.add(message.step)
            self._written(message.step)
        elif message.saved == "step" and message.step < self._order.steps:
            log.info("train: checkpoint of step %s written", f"{message.step:,}")
        if message.metrics:
            self._hear_metrics(message)

    def _hear_metrics(self, message: Message) -> None:
        self._metrics = dict(message.metrics)
        self._step, self._tokens = message.step, message.tokens
        self._tracker.metrics({f"train_{name}": value for name, value in message.metrics.items()}, message.step)
        now = time.monotonic()
        self._began = self._began or (now, message.tokens)
        if now - self._last_line >= LINE_SECONDS:
            done, first = self._images(message.tokens), self._images(self._began[1])
            total = self._images(self._order.total * self._order.drawing.draw_tokens)
            line = progress_line("train", done, total, done - first, now - self._began[0])
            log.info("%s, loss %.5f, L0 %.1f", line, message.metrics["loss"], message.metrics["l0"])
            self._last_line = now

    def _images(self, tokens: int) -> int:
        return tokens // self._order.drawing.kept_tokens

    def summary(self) -> dict[str, float]:
        """The last metrics, and what the run came to."""
        wall = self.kept.wall_seconds()
        metrics: dict[str, Any] = {
            **self._metrics,
            "images": self._tokens / self._order.drawing.kept_tokens,
            "tokens": float(self._tokens),
            "steps": float(self._step),
            "bad_images": float(len(self.kept.bad)),
            "buffer_tokens_worker": float(self._most_tokens),
            "wall_seconds": wall,
            "images_per_second": (self._tokens - self._first) / self._order.drawing.kept_tokens / wall,
            "tokens_per_second": (self._tokens - self._first) / wall,
        }
        return metrics
