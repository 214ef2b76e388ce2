"""Ray: reaching a cluster, and a plan of who gets what on it."""

import logging
import os
import socket
from dataclasses import dataclass

import ray
import ray.data  # configures its loggers on import, so before they are quietened

from patchsae_ray.errors import UserError, first_line
from patchsae_ray.settings import ModelSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Actors that run the model, and what decoding gets beside them.

    Actors never take every CPU: decoding would starve and the job hang. An actor's CPU request differs from decoding's, so
    that Ray Data keeps the two stages apart.
    """

    device: str
    actors: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    threads: int
    """Torch threads in an actor."""
    precision: str
    """fp32 or bf16."""

    def describe(self) -> str:
        return (
            f"{self.precision}, {self.actors} {self.device} actor{'s' * (self.actors != 1)} with {self.actor_cpus:g} CPU and "
            f"{self.threads} thread{'s' * (self.threads != 1)} each, {self.decode_cpus:g} CPU a decode task"
        )


def join(settings: ModelSettings) -> Plan:
    """Reach the cluster that the settings mean, and plan the job on it.

    Raises: UserError where no cluster answers, or it lacks the device.
    """
    connect(settings.ray_address)
    plan = make_plan(settings.device, settings.precision)
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
        ray.init(address=chosen, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"--ray_address {chosen}: no Ray cluster answers there ({first_line(error)})") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


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


def make_plan(device: str, precision: str = "auto") -> Plan:
    """Shares for the cluster that `connect` joined.

    Args:
        device: `--device`; auto takes the GPUs if there are any.
        precision: `--precision`; auto is bf16 on a GPU and fp32 on a CPU.

    Raises: UserError where CUDA is asked for and there is no GPU.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    cpus = [count for count in nodes if count > 0]
    if not cpus:
        raise UserError("the Ray cluster has no CPUs to decode images on")
    if device == "cuda" and gpus == 0:
        raise UserError("--device cuda: the cluster has no GPU; cpu or auto would be right")
    if device != "cpu" and gpus > 0:
        actor_cpus = 1.0 if sum(cpus) - gpus >= 1 else sum(cpus) / (2 * gpus)
        decode_cpus = _decode_cpus(sum(cpus) - gpus * actor_cpus, actor_cpus)
        return Plan("cuda", gpus, actor_cpus, 1.0, decode_cpus, 1, resolve_precision(precision, "cuda"))
    smallest = min(cpus)
    actor_cpus = max(smallest - 1, 1.0) if smallest >= 2 else smallest / 2
    decode_cpus = _decode_cpus(smallest - actor_cpus, actor_cpus)
    threads = max(1, int(smallest))
    return Plan("cpu", len(cpus), actor_cpus, 0.0, decode_cpus, threads, resolve_precision(precision, "cpu"))


def _decode_cpus(left: float, actor_cpus: float) -> float:
    wanted = min(1.0, max(0.25, left / 2))
    return wanted if wanted != actor_cpus else wanted / 2


def resolve_precision(precision: str, device: str) -> str:
    """`--precision auto` is bf16 on a GPU and fp32 on a CPU."""
    return ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision


def possible_precisions(precision: str) -> list[str]:
    """What `--precision` may come to mean."""
    return ["fp32", "bf16"] if precision == "auto" else [precision]
