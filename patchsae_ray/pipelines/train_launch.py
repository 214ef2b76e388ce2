"""Starting training workers, in this process or by Ray Train, hearing what they say, and starting them again."""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from patchsae_ray.data.activations import ActivationCache
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError, first_line, user_error
from patchsae_ray.names import ActivationDtype, Tokens
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.pipelines.progress import duration, on_this_machine
from patchsae_ray.pipelines.ray_faults import lost
from patchsae_ray.pipelines.streamed import Streamed, TowerTask
from patchsae_ray.pipelines.token_sources import Cached, ChunkSource, ChunkTower, Fused
from patchsae_ray.pipelines.train_board import Board, Message, RemoteBoard, TrainBoard
from patchsae_ray.pipelines.train_plan import TrainPlan
from patchsae_ray.pipelines.train_worker import Stopped, TrainRun, TrainWorker
from patchsae_ray.sae.collective import Alone, Distributed

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often in a row workers may die without a new checkpoint."""
POLL_SECONDS = 0.5
ROOM_SECONDS = 60.0
"""How long lost machines are waited for before a run goes on without them."""


@dataclass(frozen=True)
class TrainJob:
    """All that a worker is started with."""

    run: TrainRun
    plan: TrainPlan
    manifest: Manifest
    image_size: int
    model: PortableModel
    tokens: Tokens
    dtype: ActivationDtype
    chunk_images: int
    cache: ActivationCache | None = None
    cached_tokens: slice = field(default_factory=lambda: slice(None))
    """Which of the cached tokens are `tokens`."""

    def source(self, board: Any, workers: int) -> ChunkSource:
        """Where a worker's chunks come from.

        Args:
            board: the actor; only streams need it.
            workers: how many there are.
        """
        lanes = max(1, self.run.order.lanes // workers)
        if self.cache is not None:
            return Cached(self.cache, self.manifest, self.cached_tokens, self.dtype, lanes)
        task = TowerTask(self.model, self.tokens, self.dtype, self.chunk_images)
        if self.plan.source == "streamed":
            return Streamed(self.manifest, self.image_size, task, self.run.order, self.plan, board, lanes, self.run.width)
        tower: ChunkTower = task.start(self.plan.device)
        return Fused(self.manifest, self.image_size, tower)


class Listener(Protocol):
    """The driver's side: told every message, in order."""

    def hear(self, message: Message) -> None:
        """Take in a message."""
        ...


class _LocalBoard(TrainBoard):
    """A board in the same process, whose messages are heard at once."""

    def __init__(self, num_images: int, max_bad_fraction: float, listener: Listener) -> None:
        super().__init__(num_images, max_bad_fraction)
        self._listener = listener

    def post(self, message: Message) -> None:
        super().post(message)
        self._listener.hear(message)


def launch(job: TrainJob, max_bad_fraction: float, no_progress_minutes: float, listener: Listener) -> None:
    """Train to the end.

    Raises: UserError for what the user can put right: what a worker found, workers that keep dying, no progress.
    """
    num_images = job.manifest.num_images
    if not job.plan.on_ray:
        board = _LocalBoard(num_images, max_bad_fraction, listener)
        _work(job, board, None, Alone())
        _raise_stopped(board.stopped())
        return
    remote = ray.remote(TrainBoard).options(num_cpus=0, scheduling_strategy=on_this_machine())
    actor = remote.remote(num_images, max_bad_fraction)
    heard = _Heard(actor, listener)
    try:
        if job.plan.num_workers == 0:
            heard.while_running(lambda: _work(job, RemoteBoard(actor), actor, Alone()), no_progress_minutes)
        else:
            _fit_again_and_again(job, actor, heard, no_progress_minutes)
        _raise_stopped(str(ray.get(actor.stopped.remote())))
    finally:
        ray.kill(actor)


def _raise_stopped(reason: str) -> None:
    if reason:
        raise UserError(reason)


def _work(job: TrainJob, board: Board, actor: Any, collective: Any) -> None:
    source = job.source(actor, collective.size)
    ahead = not isinstance(source, Fused)
    _run_worker(TrainWorker(job.run, source, collective, board, job.plan.device, ahead))


def _run_worker(worker: TrainWorker) -> None:
    """Train, and leave on the board what the user can put right.

    Raises: UserError, which is also on the board; anything else is a fault of ours.
    """
    try:
        worker.train()
    except Stopped:
        return
    except Exception as error:
        known = _put_right(error, worker)
        if known is None:
            raise
        worker.board.stop(str(known))
        raise known from error


def _put_right(error: Exception, worker: TrainWorker) -> UserError | None:
    known = user_error(error)
    if known is not None:
        return known
    if isinstance(error, FloatingPointError):
        return UserError(f"training stopped: {error}; a lower --lr or another --precision would be right")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return UserError(
            f"training worker {worker.collective.rank} of {worker.collective.size} ran out of memory on {worker.device}; "
            "a smaller --batch_size, --buffer_tokens or --expansion_factor, or a larger --accumulate, would be right"
        )
    return None


def _train_loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker; the process group is there."""
    job: TrainJob = ray.get(config["job"][0])
    torch.set_num_threads(job.plan.threads)
    world = ray.train.get_context().get_world_size()
    collective = Distributed(job.run.settings.gradient_compression == "bf16") if world > 1 else Alone()
    _work(job, RemoteBoard(config["board"]), config["board"], collective)


def _fit_again_and_again(job: TrainJob, actor: Any, heard: "_Heard", no_progress_minutes: float) -> None:
    """Ray Train, started again from the newest checkpoint whenever workers are lost, on as many of them as there is room for.

    Raises: UserError where they die MAX_DEATHS times in a row without a new checkpoint; a machine that was lost is no death.
    """
    deaths, whole = 0, job.plan
    while True:
        saved = heard.saved_step
        kept = [ray.put(job)]  # in a list, so that Ray Train hands on the reference
        try:
            heard.while_running(partial(_fit, job.plan, kept, actor), no_progress_minutes)
            return
        except TrainingFailedError as error:
            _raise_stopped(str(ray.get(actor.stopped.remote())))
            loss = _loss(error)
            if loss is None:
                raise
        deaths = (1 if heard.saved_step > saved else deaths + 1) if loss.own else deaths
        if deaths >= MAX_DEATHS:
            raise UserError(
                f"training workers died {deaths} times without a new checkpoint, the last time: {loss.said}; "
                "what was trained up to the newest checkpoint stays, and the same command goes on from there"
            )
        workers = workers_with_room(whole)
        log.warning(
            "train: %s; starting again from the newest checkpoint%s", loss.said,
            f" with {workers} of {whole.num_workers} workers" if workers < whole.num_workers else "",
        )  # fmt: skip
        job = replace(job, plan=whole.with_workers(workers))


def workers_with_room(plan: TrainPlan) -> int:
    """How many of a plan's workers the machines that live have room for, at least 1; lost ones are waited for a while.

    Where tokens are streamed each worker's share of the actors, and a decoding task, need room too. The order of the tokens
    does not depend on the number of workers, so a run goes on with fewer.
    """
    deadline = time.monotonic() + ROOM_SECONDS
    own = {"CPU": plan.worker_cpus, "GPU": plan.worker_gpus}
    beside = {"CPU": plan.actor_cpus + plan.decode_cpus, "GPU": plan.actor_gpus} if plan.source == "streamed" else {}
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(_fitting(node, own) for node in nodes)  # a worker lies on one machine
        total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in own}
        room = min(room, _fitting(total, {kind: amount + beside.get(kind, 0.0) for kind, amount in own.items()}))
        if room >= plan.num_workers or time.monotonic() > deadline:
            return max(1, min(plan.num_workers, room))
        time.sleep(POLL_SECONDS)


def _fitting(there: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How often what is wanted fits in what is there."""
    return int(min(there.get(kind, 0.0) // amount for kind, amount in wanted.items() if amount))


def _fit(plan: TrainPlan, kept: list[Any], actor: Any) -> None:
    resources = {"CPU": plan.worker_cpus, **({"GPU": plan.worker_gpus} if plan.worker_gpus else {})}
    with tempfile.TemporaryDirectory(prefix="ray-train-") as scratch:  # Ray Train's own notes; checkpoints are ours
        TorchTrainer(
            _train_loop,
            train_loop_config={"job": kept, "board": actor},
            torch_config=TorchConfig(backend="nccl" if plan.device == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.num_workers, use_gpu=plan.device == "cuda", resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(name="train", storage_path=scratch),
        ).fit()


@dataclass(frozen=True)
class _Loss:
    """How a worker was lost."""

    said: str
    """In one line."""
    own: bool
    """Whether its process died by itself; not where its machine was lost or taken back."""


def _loss(error: TrainingFailedError) -> _Loss | None:
    """How a worker was lost, by itself if any was; None where an error of our own ended it."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    found = []
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "health_check_failure", failure)
        if isinstance(cause, ray.exceptions.RayError) and not isinstance(cause, ray.exceptions.RayTaskError):
            machine = getattr(cause, "preempted", False) or isinstance(cause, ray.exceptions.NodeDiedError)
            what = "was lost with its machine" if machine else "died"
            found.append(_Loss(f"training worker {rank} {what} ({lost(cause) or first_line(cause)})", not machine))
    return next((one for one in found if one.own), found[0] if found else None)


class _Heard:
    """Takes the board's messages while workers run.

    Args:
        actor: the board.
        listener: told each message.
    """

    def __init__(self, actor: Any, listener: Listener) -> None:
        self._actor, self._listener = actor, listener
        self.saved_step = 0
        """Of the newest checkpoint."""

    def while_running(self, work: Callable[[], None], no_progress_minutes: float) -> None:
        """Run `work` on a thread and hear messages until it ends.

        Raises: what it raised; UserError where no message came for too long.
        """
        raised: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, name="training", daemon=True)
        thread.start()
        moved = time.monotonic()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if self._take():
                moved = time.monotonic()
            elif time.monotonic() - moved > 60 * no_progress_minutes:
                raise UserError(
                    f"train: nothing was heard for {duration(time.monotonic() - moved)} (--no_progress_minutes); "
                    "what the newest checkpoint holds stays, and the same command goes on from there"
                )
        self._take()
        if raised:
            raise raised[0]

    def _take(self) -> bool:
        messages: list[Message] = ray.get(self._actor.take.remote())
        for message in messages:
            if message.saved == "step":
                self.saved_step = max(self.saved_step, message.step)
            self._listener.hear(message)
        return bool(messages)
