"""Who gets what of a cluster: pure functions of what the cluster has, of what it may grow to, and of what is asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from patchsae_ray.errors import UserError

GPU_ACTOR_CPUS = 0.9
"""Of an actor on a GPU, whose thread mostly waits for it; not 1, so that Ray Data keeps it apart from decoding."""
DECODE_CPUS = 1.0
"""Of a decode task: it is one busy process, and a share of a CPU would let a node run more of them than it has CPUs."""
DECODERS_AN_ACTOR = 16
"""Decode tasks, at least, for each actor that are allowed for, so that a cluster that grows is not held back."""
LEAST_STORE_BYTES = 128 * 2**20
"""Of the object store that a pass may fill, however small its images."""
WELL_USED = 0.8
"""Share of the CPUs that equal actors must use, where larger actors, and fewer, would leave more of them idle."""


@dataclass(frozen=True)
class Node:
    """What a machine has."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """What the machines of a cluster have.

    Args:
        nodes: that are alive.
        addable: that the autoscaler may still add, by the maximum that is declared for each of its groups.
        free_gpus: that no job holds now; None for all.
    """

    nodes: tuple[Node, ...]
    addable: tuple[Node, ...] = ()
    free_gpus: float | None = None

    @property
    def everything(self) -> tuple[Node, ...]:
        """What it has and may add."""
        return self.nodes + self.addable


@dataclass(frozen=True)
class Wishes:
    """What the settings ask for; None is planned."""

    workers: tuple[int, int] | None = None
    num_gpus: float | None = None
    decode_cpus: float | None = None


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


def plan(cluster: Cluster, device: str, precision: str = "auto", wishes: Wishes | None = None) -> tuple[Plan, str]:
    """Shares for a job. Returns the plan, and a line about what other jobs hold, empty where they hold nothing.

    Args:
        cluster: has CPUs, or may add some.
        device: `--device`; auto takes the GPUs if there are any, or may be.
        precision: `--precision`; auto is bf16 on a GPU and fp32 on a CPU.
        wishes: `--workers`, `--num_gpus`, `--decode_cpus`.

    Raises: UserError where CUDA is asked for and there is no GPU to have, or the wishes leave no CPU to decode on.
    """
    wishes = wishes or Wishes()
    gpus = sum(node.gpus for node in cluster.everything)
    if device == "cuda" and gpus == 0 and wishes.workers is None:
        raise UserError(
            "--device cuda: the cluster has no GPU; cpu or auto would be right, or --workers MIN:MAX where it will grow some"
        )
    if device == "cuda" or (device == "auto" and gpus > 0):
        return _gpu_plan(cluster, precision, wishes), _taken(cluster)
    if wishes.num_gpus:
        raise UserError(f"--num_gpus {wishes.num_gpus:g}: the model runs on CPUs here (--device {device}, {gpus:g} GPUs)")
    return _cpu_plan(cluster, precision, wishes), ""


def store_bytes(plan: Plan, unit_bytes: int, cpus: float) -> int:
    """Of the object store that decoded units may fill: twice those that are being decoded and a few for each actor.

    Without a bound decoding would run ahead as far as the store is large, and claim units that other drivers could run now.

    Args:
        plan: who gets what.
        unit_bytes: of the pixels of a unit.
        cpus: of the cluster.
    """
    decoders = max(math.ceil(cpus / plan.decode_cpus), DECODERS_AN_ACTOR * plan.max_actors)
    return max(LEAST_STORE_BYTES, 2 * unit_bytes * (decoders + 4 * plan.max_actors))


def _taken(cluster: Cluster) -> str:
    held = sum(node.gpus for node in cluster.nodes)
    free = held if cluster.free_gpus is None else cluster.free_gpus
    if free >= held:
        return ""
    if free == 0:
        return f"other jobs hold all {held:g} GPUs; this one begins when they let go of one"
    return f"other jobs hold {held - free:g} of {held:g} GPUs; this one takes the rest, and theirs when they let go of them"


def _gpu_plan(cluster: Cluster, precision: str, wishes: Wishes) -> Plan:
    each = 1.0 if wishes.num_gpus is None else wishes.num_gpus
    if each == 0:
        raise UserError("--num_gpus 0: an actor on a GPU needs some of it; 1, or a fraction, would be right")
    low, high = wishes.workers or _gpu_actors(cluster, each)
    actor_cpus, decode_cpus = _beside_gpus(cluster.everything, each, wishes.decode_cpus)
    return Plan("cuda", low, high, actor_cpus, each, decode_cpus, 1, resolve_precision(precision, "cuda"))


def _gpu_actors(cluster: Cluster, each: float) -> tuple[int, int]:
    """As many as fit on the free GPUs, and as many as fit on all that there are or may be."""
    now, ever = (sum(_fitting(node.gpus, each) for node in nodes) for nodes in (cluster.nodes, cluster.everything))
    if cluster.free_gpus is not None:
        now = min(now, _fitting(cluster.free_gpus, each))
    return max(1, now), max(1, ever)


def _beside_gpus(nodes: Sequence[Node], each: float, decode: float | None) -> tuple[float, float]:
    """CPUs of (an actor on a GPU, a decode task) that leave room for decoding."""
    hosts = [(node.cpus, _fitting(node.gpus, each)) for node in nodes if _fitting(node.gpus, each)]
    others = max((node.cpus for node in nodes if not _fitting(node.gpus, each)), default=0.0)

    def leaves_room(actor: float, task: float) -> bool:
        left = [cpus - number * actor for cpus, number in hosts]
        return min(left, default=0.0) >= 0 and max([*left, others]) >= task

    wanted = DECODE_CPUS if decode is None else decode
    actor = GPU_ACTOR_CPUS if wanted != GPU_ACTOR_CPUS else GPU_ACTOR_CPUS / 2
    if not hosts or leaves_room(actor, wanted):
        return actor, wanted
    largest = max(others, *(cpus for cpus, _ in hosts))
    wanted = min(DECODE_CPUS, largest / 4) if decode is None else decode
    room = 0.0 if others >= wanted else wanted
    actor = min(math.floor(1000 * (cpus - room) / number) / 1000 for cpus, number in hosts)
    if actor < 0 or wanted > largest:
        raise UserError(f"--decode_cpus {wanted:g}: the machines with GPUs have {largest:g} CPUs at most, and actors need some")
    return _apart(min(actor, GPU_ACTOR_CPUS), wanted), wanted


def _cpu_plan(cluster: Cluster, precision: str, wishes: Wishes) -> Plan:
    sizes = [node.cpus for node in cluster.everything if node.cpus > 0]
    alive = [node.cpus for node in cluster.nodes if node.cpus > 0]
    if wishes.workers is None:
        share = _even_share(sizes)
        low, high = max(1, _number(alive, share)), _number(sizes, share)
    else:
        low, high = wishes.workers
        share = _share_for(sizes, high)
    decode_cpus = min(DECODE_CPUS, share / 4) if wishes.decode_cpus is None else wishes.decode_cpus
    hosts = [(size, _fitting(size, share)) for size in sizes if _fitting(size, share)]
    if decode_cpus >= min(size for size, _ in hosts):
        smallest = min(size for size, _ in hosts)
        raise UserError(f"--decode_cpus {decode_cpus:g}: a machine has {smallest:g} CPUs, and the model needs some of them")
    actor_cpus = min(math.floor(1000 * (size - max(decode_cpus, size / 16)) / number) / 1000 for size, number in hosts)
    threads = max(1, int(share + 1e-9))
    precision = resolve_precision(precision, "cpu")
    return Plan("cpu", low, high, _apart(actor_cpus, decode_cpus), 0.0, decode_cpus, threads, precision)


def _even_share(sizes: Sequence[float]) -> float:
    """CPUs of each of equal actors: as many as a machine has, the largest that uses the machines well."""
    used = {share: share * _number(sizes, share) / sum(sizes) for share in sorted(set(sizes), reverse=True)}
    return next((share for share, part in used.items() if part >= WELL_USED), max(used, key=lambda share: used[share]))


def _share_for(sizes: Sequence[float], actors: int) -> float:
    """The most CPUs that each of so many equal actors can have."""
    shares = sorted({size / parts for size in set(sizes) for parts in range(1, actors + 1)}, reverse=True)
    return next(share for share in shares if _number(sizes, share) >= actors)


def _number(sizes: Sequence[float], share: float) -> int:
    return sum(_fitting(size, share) for size in sizes)


def _fitting(whole: float, part: float) -> int:
    return math.floor(whole / part + 1e-9)


def _apart(actor_cpus: float, decode_cpus: float) -> float:
    """An actor's CPUs, other than a decode task's."""
    return actor_cpus if actor_cpus != decode_cpus else math.floor(900 * actor_cpus) / 1000


def resolve_precision(precision: str, device: str) -> str:
    """`--precision auto` is bf16 on a GPU and fp32 on a CPU."""
    return ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision
