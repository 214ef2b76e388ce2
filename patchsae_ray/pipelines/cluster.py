"""Ray: reaching a cluster, and a plan of who gets what on it."""

import logging
import math
import os
import socket
from dataclasses import dataclass

import ray
import ray.data  # configures its loggers on import, so before they are quietened

from patchsae_ray.errors import UserError, first_line
from patchsae_ray.settings import ModelSettings, PoolSettings
from patchsae_ray.signals import handler_kept

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Actors that run the model, and what decoding gets beside them.

    Actors never take every CPU: decoding would starve and the job hang. An actor's CPU request differs from decoding's, so
    that Ray Data keeps the two stages apart.
    """

    device: str
    min_actors: int
    max_actors: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    threads: int
    """Torch threads in an actor."""
    precision: str
    """fp32 or bf16."""

    def describe(self) -> str:
        number = f"{self.min_actors}" if self.min_actors == self.max_actors else f"{self.min_actors} to {self.max_actors}"
        gpus = f", {self.actor_gpus:g} GPU" if self.actor_gpus else ""
        return (
            f"{self.precision}, {number} {self.device} actor{'s' * (self.max_actors != 1)} with {self.actor_cpus:g} CPU{gpus} "
            f"and {self.threads} thread{'s' * (self.threads != 1)} each, {self.decode_cpus:g} CPU a decode task"
        )


def join(settings: ModelSettings) -> Plan:
    """Reach the cluster that the settings mean, and plan the job on it.

    Raises: UserError where no cluster answers, or it lacks the device.
    """
    connect(settings.ray_address)
    wishes = Wishes()
    if isinstance(settings, PoolSettings):
        wishes = Wishes(settings.worker_bounds(), settings.num_gpus, settings.decode_cpus)
    plan = make_plan(settings.device, settings.precision, wishes)
    log.info("Ray: %s", plan.describe())
    return plan


def connect(address: str | None) -> None:
    """Join the cluster at `address`, else $RAY_ADDRESS, else start a Ray of this job's own.

    Raises: UserError where no cluster answers.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    chosen = address or os.environ.get("RAY_ADDRESS") or "local"
    options = {}
    if chosen == "local":
        options = {"include_dashboard": False}
        # Ray Data's own actors print a line marked E at every start (ray-project/ray#57733); this Ray is ours alone.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    _probe(chosen)
    try:
        with handler_kept():
            ray.init(address=chosen, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"--ray_address {chosen}: no Ray cluster answers there ({first_line(error)})") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def several_machines() -> bool:
    """Whether the cluster has other machines than this one, which may not see its files."""
    return len(ray.nodes()) > 1


def _probe(address: str) -> None:
    """See that something listens at host:port; Ray itself would try for minutes.

    Raises: UserError where nothing does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray_address {address}: no Ray cluster answers there ({first_line(error)})") from error


@dataclass(frozen=True)
class Wishes:
    """What the settings ask for; None is planned."""

    workers: tuple[int, int] | None = None
    num_gpus: float | None = None
    decode_cpus: float | None = None


def make_plan(device: str, precision: str = "auto", wishes: Wishes | None = None) -> Plan:
    """Shares for the cluster that `connect` joined.

    Args:
        device: `--device`; auto takes the GPUs if there are any.
        precision: `--precision`; auto is bf16 on a GPU and fp32 on a CPU.
        wishes: `--workers`, `--num_gpus`, `--decode_cpus`.

    Raises: UserError where CUDA is asked for and there is no GPU to have, or the wishes leave no CPU to decode on.
    """
    wishes = wishes or Wishes()
    gpus = ray.cluster_resources().get("GPU", 0.0)
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    cpus = [count for count in nodes if count > 0]
    if not cpus:
        raise UserError("the Ray cluster has no CPUs to decode images on")
    if device == "cuda" and gpus == 0 and wishes.workers is None:
        raise UserError(
            "--device cuda: the cluster has no GPU; cpu or auto would be right, or --workers MIN:MAX where it will grow some"
        )
    if device != "cpu" and (gpus > 0 or device == "cuda"):
        return _gpu_plan(gpus, sum(cpus), precision, wishes)
    if wishes.num_gpus:
        raise UserError(f"--num_gpus {wishes.num_gpus:g}: the model runs on CPUs here (--device {device}, {gpus:g} GPUs)")
    return _cpu_plan(cpus, precision, wishes)


def _gpu_plan(gpus: float, cpus: float, precision: str, wishes: Wishes) -> Plan:
    each = 1.0 if wishes.num_gpus is None else wishes.num_gpus
    if each == 0:
        raise UserError("--num_gpus 0: an actor on a GPU needs some of it; 1, or a fraction, would be right")
    low, high = wishes.workers or (max(1, int(gpus / each)),) * 2
    actor_cpus = 1.0 if cpus - high >= 1 else round(cpus / (2 * high), 3)
    decode_cpus = wishes.decode_cpus or _decode_cpus(cpus - high * actor_cpus, actor_cpus)
    if decode_cpus == actor_cpus:
        actor_cpus = round(0.9 * actor_cpus, 3)
    return Plan("cuda", low, high, actor_cpus, each, decode_cpus, 1, resolve_precision(precision, "cuda"))


def _cpu_plan(cpus: list[float], precision: str, wishes: Wishes) -> Plan:
    smallest = min(cpus)
    low, high = wishes.workers or (len(cpus), len(cpus))
    on_a_node = max(1, math.ceil(high / len(cpus)))
    room = wishes.decode_cpus
    if room is None:
        share = 1.0 if on_a_node == 1 else smallest / 4
        room = min(1.0, share) if smallest >= 2 else smallest / 2
    if room >= smallest:
        raise UserError(f"--decode_cpus {room:g}: the smallest machine has {smallest:g} CPUs, and the model needs some of them")
    actor_cpus = math.floor(1000 * (smallest - room) / on_a_node) / 1000
    decode_cpus = wishes.decode_cpus or _decode_cpus(smallest - on_a_node * actor_cpus, actor_cpus)
    if decode_cpus == actor_cpus:
        actor_cpus = round(0.9 * actor_cpus, 3)
    threads = max(1, int(smallest // on_a_node))
    return Plan("cpu", low, high, actor_cpus, 0.0, decode_cpus, threads, resolve_precision(precision, "cpu"))


def _decode_cpus(left: float, actor_cpus: float) -> float:
    wanted = min(1.0, max(0.25, left / 2))
    return wanted if wanted != actor_cpus else wanted / 2


def resolve_precision(precision: str, device: str) -> str:
    """`--precision auto` is bf16 on a GPU and fp32 on a CPU."""
    return ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision


def possible_precisions(precision: str) -> list[str]:
    """What `--precision` may come to mean."""
    return ["fp32", "bf16"] if precision == "auto" else [precision]
