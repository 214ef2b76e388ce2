"""Ray: reaching a cluster, and seeing what it has."""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence

import ray
import ray.data  # configures its loggers on import, so before they are quietened
from ray.autoscaler.sdk import request_resources

from patchsae_ray.errors import UserError, first_line
from patchsae_ray.pipelines.planning import Cluster, Node, Plan, Wishes, plan
from patchsae_ray.pipelines.progress import duration
from patchsae_ray.settings import ModelSettings, PoolSettings
from patchsae_ray.signals import handler_kept

log = logging.getLogger(__name__)

SCALE_SECONDS = 600.0
"""How long a cluster without CPUs is given to start its first machine."""
SCALE_POLL_SECONDS = 5.0
SETTLE_SECONDS = 5.0
"""How long GPUs that seem to be taken may be those of a pass that has just ended."""
MOST_ADDABLE = 1000
"""Machines of a group that are planned for, at most."""


def join(settings: ModelSettings) -> Plan:
    """Reach the cluster that the settings mean, and plan the job on it.

    Raises: UserError where no cluster answers, or it lacks the device.
    """
    connect(settings.ray_address)
    wishes = Wishes()
    if isinstance(settings, PoolSettings):
        wishes = Wishes(settings.worker_bounds(), settings.num_gpus, settings.decode_cpus)
    made = make_plan(settings.device, settings.precision, wishes)
    log.info("Ray: %s", made.describe())
    return made


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


def make_plan(device: str, precision: str = "auto", wishes: Wishes | None = None) -> Plan:
    """`planning.plan` for the cluster that `connect` joined; waits for its first machine with CPUs, if it has none yet.

    Raises: UserError as `plan`, or where no machine with CPUs comes.
    """
    found, said = plan(wait_for_cpus(), device, precision, wishes)
    if said:
        log.info("Ray: %s", said)
    return found


def wait_for_cpus() -> Cluster:
    """What the cluster has, once it has CPUs or its autoscaler declares that it may add some.

    Raises: UserError where none come for `SCALE_SECONDS`, though they were asked for.
    """
    found = describe()
    if _has_cpus(found):
        return found
    log.info("Ray: the cluster has no CPUs yet; waiting up to %s for a machine with some", duration(SCALE_SECONDS))
    request_resources(num_cpus=1)
    try:
        deadline = time.monotonic() + SCALE_SECONDS
        while not _has_cpus(found):
            if time.monotonic() > deadline:
                raise UserError(
                    f"the Ray cluster has no CPUs to decode images on, and none came in {duration(SCALE_SECONDS)}; "
                    "machines with CPUs, or an autoscaler that adds them, would be right"
                )
            time.sleep(SCALE_POLL_SECONDS)
            found = describe()
    finally:
        request_resources(num_cpus=0)
    return found


def _has_cpus(cluster: Cluster) -> bool:
    return any(node.cpus > 0 for node in cluster.everything)


def describe() -> Cluster:
    """What the cluster that `connect` joined has, may add, and has lent to other jobs."""
    alive = [Node(*(node["Resources"].get(what, 0.0) for what in ("CPU", "GPU"))) for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple(alive), addable(alive, _declared_groups()), _free_gpus(sum(node.gpus for node in alive)))


def addable(alive: Sequence[Node], groups: Sequence[tuple[Node, int]]) -> tuple[Node, ...]:
    """Nodes that an autoscaler may still add.

    Args:
        alive: nodes that are there.
        groups: (what a node of it has, how many there may be in all) of each of the autoscaler's groups of nodes.
    """
    left = Counter(alive)
    found: list[Node] = []
    for node, most in groups:
        there = min(left[node], most)
        left[node] -= there
        found += [node] * min(most - there, MOST_ADDABLE)
    return tuple(found)


def _declared_groups() -> list[tuple[Node, int]]:
    config = ray._private.state.state.get_cluster_config()  # as Ray Data and Ray Train read it; there is no public way
    groups = config.node_group_configs if config is not None else []
    sizes = [(dict(group.resources), int(group.max_count)) for group in groups]
    return [
        (Node(float(has.get("CPU", 0)), float(has.get("GPU", 0))), most if most >= 0 else MOST_ADDABLE) for has, most in sizes
    ]


def _free_gpus(held: float) -> float:
    """GPUs that no job holds; what an earlier pass of this process lets go of is waited for a little."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        free = float(ray.available_resources().get("GPU", 0.0))
        if free >= held or time.monotonic() > deadline:
            return free
        time.sleep(0.5)


def possible_precisions(precision: str) -> list[str]:
    """What `--precision` may come to mean."""
    return ["fp32", "bf16"] if precision == "auto" else [precision]
