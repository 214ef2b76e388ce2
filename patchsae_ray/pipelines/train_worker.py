"""What a training worker does: its lanes' tokens in, steps together with the others, checkpoints out. Knows no Ray."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.data.chunks import Demand, LaneOrder
from patchsae_ray.data.mixed import Mixing
from patchsae_ray.data.mixing import TokenBatch, TokenMixer
from patchsae_ray.errors import UserError
from patchsae_ray.measure.matmul import matmul_rate
from patchsae_ray.measure.stages import peak_bytes
from patchsae_ray.pipelines.devices import device_name
from patchsae_ray.pipelines.prefetch import prefetched
from patchsae_ray.pipelines.resume import AsyncWriter, Kind, ResumeFolder, Saved
from patchsae_ray.pipelines.token_sources import ChunkSource
from patchsae_ray.pipelines.train_board import Board, Message
from patchsae_ray.sae.collective import Collective, gathered
from patchsae_ray.sae.model import SparseAutoencoder, geometric_median, initialise
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import StepMetrics, Trainer
from patchsae_ray.settings import TrainSettings

B_DEC_TOKENS = 65_536
"""Tokens, at most, whose centre b_dec starts at."""
REPORT_STEPS = 10
"""Steps between the metrics that the driver gets."""
AHEAD_BATCHES = 2
"""Batches that are mixed while others are trained on."""
_SAVE, _STOP = 1, 1 << 20  # flags that rank 0 raises with a step


class Stopped(Exception):
    """The board says that the run must stop."""


@dataclass(frozen=True)
class TrainRun:
    """One run, the same for every worker."""

    settings: TrainSettings
    order: LaneOrder
    width: int
    """d."""
    cls_place: int | None
    """Which of an image's tokens is CLS."""
    resume: ResumeFolder
    precision: str
    extra_steps: tuple[int, ...]
    """After which the weights alone are kept too (--n_checkpoints)."""
    labels: np.ndarray | None = None
    """[images of the data set] int32, -1 without one; None where none has a label."""


@dataclass
class TrainWorker:
    """One of the workers of a run.

    Args:
        run: the run.
        source: where chunks come from.
        collective: the other workers.
        board: the driver.
        device: cpu or cuda.
        ahead: whether batches are mixed ahead, on a thread; not where the source runs CLIP on the same device.
    """

    run: TrainRun
    source: ChunkSource
    collective: Collective
    board: Board
    device: str
    ahead: bool

    def __post_init__(self) -> None:
        order = self.run.order
        self._lanes = range(self.collective.rank, order.lanes, self.collective.size)
        self._writer = AsyncWriter()
        self._seconds = {"data": 0.0, "step": 0.0}
        self._logged = time.perf_counter()
        self._window: np.ndarray | None = None
        self._device_name = device_name(self.device)
        self._logged_step = self._saved_step = 0
        self._saved_at = time.monotonic()
        self._bad_posted: set[int] = set()

    def train(self) -> None:
        """From the newest checkpoint, or from the start, to the end.

        Raises: UserError for what the user can put right; Stopped where the board says so.
        """
        order, saved = self.run.order, self._resume()
        cursors = np.zeros((order.lanes, 2), dtype=np.int64) if saved is None else saved.tensors["cursors"].numpy().copy()
        first = 0 if saved is None else saved.step
        trainer = self._trainer(saved)
        del saved  # as large as the trainer
        self._rate = matmul_rate(self.device, torch.bfloat16 if self.run.precision == "bf16" else torch.float32)
        demand = Demand(order, self._lanes, cursors, first)
        chunks = self.source.chunks(demand)
        self._mixer = TokenMixer(order, self._lanes, demand, chunks, cursors, self.run.cls_place)
        batches: Iterator[TokenBatch] = (self._mixer.step(step) for step in range(first, order.steps))
        if self.device == "cuda":
            batches = (batch.pinned() for batch in batches)
        if self.ahead:
            batches = prefetched(batches, AHEAD_BATCHES)
        self._logged_step = self._saved_step = first
        try:
            for step in range(first, order.steps):
                self._step(trainer, step, batches)
            self._writer.wait()
        except BaseException:
            with contextlib.suppress(Exception):  # what ended the run is what is told, not what closing it came to
                _close(batches, chunks)
            raise
        _close(batches, chunks)

    def _resume(self) -> Saved | None:
        """The checkpoint that rank 0 finds to be the newest whole one."""
        folder, saved = self.run.resume, None
        agreed = torch.zeros(1, dtype=torch.int64, device=self.device)
        if self.collective.rank == 0:
            saved = folder.newest(lambda line: self.board.post(Message(0, 0, warning=line)))
            agreed[0] = 0 if saved is None else saved.step + 1
        self.collective.sum_(agreed)
        step = int(agreed) - 1
        if step >= 0 and self.collective.rank == 0:
            self.board.post(Message(step, self._tokens_after(step), resumed=True))
        if step < 0 or saved is not None:
            return saved
        saved = folder.read(step)
        if saved is None:
            raise UserError(
                f"{folder.own}: not every worker can read the checkpoint of step {step}; "
                "--root_dir on storage that all machines share would be right"
            )
        return saved

    def _tokens_after(self, step: int) -> int:
        drawing = self.run.order.drawing
        return min(step * drawing.batch_size, self.run.order.total) * drawing.draw_tokens

    def _trainer(self, saved: Saved | None) -> Trainer:
        """With the checkpoint's state, or at PatchSAE's start but for b_dec, which the first batch decides."""
        settings = self.run.settings
        sae = SparseAutoencoder(self.run.width, self.run.width * settings.expansion_factor)
        if saved is None:
            initialise(sae, torch.Generator().manual_seed(settings.seed))
        trainer = Trainer(
            sae.to(self.device),
            Objective(settings.l1_coefficient, settings.mse_cls_coefficient, settings.use_ghost_grads),
            Schedule(settings.lr_scheduler_name, self.run.order.steps, settings.lr_warm_up_steps),
            settings.lr,
            settings.dead_feature_window,
            accumulate=settings.accumulate,
            collective=self.collective,
        )
        if saved is not None:
            trainer.load_state({name: value for name, value in saved.tensors.items() if name != "cursors"})
        return trainer

    def _step(self, trainer: Trainer, step: int, batches: Iterator[TokenBatch]) -> None:
        start = time.perf_counter()
        batch = next(batches)
        x = batch.x.to(self.device, non_blocking=True).to(torch.float32) if len(batch.x) else self._no_tokens()
        is_cls = None if batch.is_cls is None else batch.is_cls.to(self.device, non_blocking=True)
        got = time.perf_counter()
        if step == 0:
            self._start_b_dec(trainer.sae, x)
        num_tokens = self.run.order.step_draws(step) * self.run.order.drawing.draw_tokens
        with autocast(self.device, self.run.precision):
            metrics = trainer.step(x, is_cls, num_tokens, self._flags(step + 1))
        done = time.perf_counter()
        self._seconds["data"] += got - start
        self._seconds["step"] += done - got
        self._window = self._window if batch.window_images is None else batch.window_images
        self._post_bad(step + 1, batch)
        if metrics.flag >= _STOP:
            raise Stopped
        last = step + 1 == self.run.order.steps
        save = bool(metrics.flag & _SAVE) or last
        notes: dict[str, Any] = {}
        if save or (step + 1) % REPORT_STEPS == 0:
            notes = self._report(trainer, metrics, step + 1, batch.images)
        if step + 1 in self.run.extra_steps:
            self._save(step + 1, trainer.sae.state_dict(), "weights", notes)
        if save:
            self._save_all(trainer, step + 1, batch, notes)

    def _no_tokens(self) -> Tensor:
        return torch.empty(0, self.run.width, device=self.device)

    def _flags(self, done: int) -> int:
        """What rank 0 has all workers do after the step that makes `done`."""
        if self.collective.rank != 0:
            return 0
        settings = self.run.settings
        by_steps = 0 < settings.checkpoint_steps <= done - self._saved_step
        by_time = 0 < 60 * settings.checkpoint_minutes <= time.monotonic() - self._saved_at
        stop = done % REPORT_STEPS == 0 and bool(self.board.stopped())
        return (_SAVE if (by_steps or by_time) and not self._writer.busy else 0) + (_STOP if stop else 0)

    @torch.no_grad()
    def _start_b_dec(self, sae: SparseAutoencoder, x: Tensor) -> None:
        """b_dec at a centre of the first global batch's tokens, the same for any number of workers."""
        method = self.run.settings.b_dec_init_method
        if method == "zeros":
            return
        order = self.run.order
        shares = order.shares(0) * order.drawing.draw_tokens
        starts = np.cumsum(shares) - shares
        mine = np.concatenate([np.arange(starts[lane], starts[lane] + shares[lane]) for lane in self._lanes])
        chosen = np.random.default_rng([self.run.settings.seed, B_DEC_TOKENS]).permutation(shares.sum())[:B_DEC_TOKENS]
        slot = np.full(shares.sum(), -1)
        slot[np.sort(chosen)] = np.arange(len(chosen))
        slots = torch.from_numpy(slot[mine]).to(self.device)
        tokens = torch.zeros(len(chosen), self.run.width, device=self.device)
        tokens[slots[slots >= 0]] = x[slots >= 0]
        self.collective.sum_(tokens)
        tokens = tokens.cpu()
        sae.b_dec.copy_(geometric_median(tokens) if method == "geometric_median" else tokens.mean(dim=0))

    def _post_bad(self, step: int, batch: TokenBatch) -> None:
        bad = [row for row in batch.bad if row[0] not in self._bad_posted]
        if bad:
            self._bad_posted.update(position for position, _, _ in bad)
            self.board.post(Message(step, self._tokens_after(step), bad=bad))

    def _report(self, trainer: Trainer, metrics: StepMetrics, step: int, images: np.ndarray) -> dict[str, Any]:
        """Metrics of all workers' steps since the last report, for the checkpoint; rank 0 leaves them on the board."""
        window = trainer.window_result()
        wait = torch.tensor(self._seconds["data"], dtype=torch.float64, device=self.device)
        self.collective.sum_(wait)
        now, steps = time.perf_counter(), step - self._logged_step
        seconds = now - self._logged
        tokens = self._tokens_after(step) - self._tokens_after(self._logged_step)
        values = {
            **{name: value for name, value in asdict(metrics).items() if name != "flag"},
            **window.as_metrics(),
            "lr": trainer.lr * trainer.schedule.factor(step - 1),
            **self._mixing(images),
            "tokens_per_second": tokens / seconds,
            "images_per_second": tokens / self.run.order.drawing.kept_tokens / seconds,
            "data_wait_share": min(1.0, float(wait) / self.collective.size / seconds),
            "model_flop_utilisation": trainer.flops_last_step * steps / seconds / self._rate / self.collective.size,
        }
        message = Message(
            step, self._tokens_after(step), values, seconds=self._seconds, peak_bytes=peak_bytes(),
            most_tokens=self._mixer.most_tokens, device=self._device_name,
        )  # fmt: skip
        self.board.post(message if self.collective.rank == 0 else replace(message, metrics={}))
        self._seconds = {"data": 0.0, "step": 0.0}
        self._logged, self._logged_step = now, step
        return {"metrics": values, "latent_density": window.log_density.tolist()}

    def _mixing(self, images: np.ndarray) -> dict[str, float]:
        """Images and classes of the last batch, and of the last whole window, over all workers.

        Args:
            images: of this worker's part of the last batch.
        """
        of_batch = np.unique(gathered(self.collective, images, self.device))
        metrics = Mixing.of(of_batch, self.run.labels).as_metrics()
        if self._window is None:  # on all workers alike
            return metrics
        of_window = np.unique(gathered(self.collective, self._window, self.device))
        return {**metrics, **Mixing.of(of_window, self.run.labels).as_metrics("_window")}

    def _save_all(self, trainer: Trainer, step: int, batch: TokenBatch, notes: dict[str, Any]) -> None:
        cursors = torch.from_numpy(batch.cursors).to(self.device)
        self.collective.sum_(cursors)
        self._saved_step, self._saved_at = step, time.monotonic()
        self._save(step, {**trainer.state(), "cursors": cursors}, "step", notes)

    def _save(self, step: int, tensors: dict[str, Tensor], kind: Kind, notes: dict[str, Any]) -> None:
        """Rank 0 writes in the background what all workers have alike."""
        if self.collective.rank == 0:
            self._writer.submit(lambda copies: self._write(step, copies, kind, notes), tensors)

    def _write(self, step: int, tensors: dict[str, Tensor], kind: Kind, notes: dict[str, Any]) -> None:
        self.run.resume.save(step, tensors, kind, notes)
        self.board.post(Message(step, self._tokens_after(step), saved=kind))


def _close(*iterators: Any) -> None:
    """End what works ahead; what takes from another first."""
    for one in iterators:
        close = getattr(one, "close", None)
        if close is not None:
            close()


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """bf16 products around float32 weights, or nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
