"""Who gets what in training: workers that train, and actors that run CLIP for them where tokens are streamed."""

import logging
import math
from dataclasses import asdict, dataclass, replace

import ray
import torch

from patchsae_ray.errors import UserError
from patchsae_ray.names import TokenSource
from patchsae_ray.pipelines.cluster import connect, make_plan
from patchsae_ray.pipelines.planning import Plan, Wishes, resolve_precision
from patchsae_ray.settings import TrainSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPlan(Plan):
    """A plan whose actors, where there are any, run CLIP for the workers."""

    num_workers: int
    """0 trains in the driver's process."""
    worker_cpus: float
    worker_gpus: float
    source: TokenSource
    on_ray: bool
    """Whether anything runs on Ray at all."""

    def with_workers(self, workers: int) -> "TrainPlan":
        """The same with fewer workers, and actors in proportion."""
        low, high = (-(-actors * workers // max(1, self.num_workers)) for actors in (self.min_actors, self.max_actors))
        return replace(self, num_workers=workers, min_actors=low, max_actors=high)

    def describe(self) -> str:
        workers = f"{self.num_workers} worker{'s' * (self.num_workers != 1)}" if self.num_workers else "this process"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        said = f"{self.precision}, {workers} on {self.device} with {threads} each, tokens {self.source}"
        return (
            f"{said}, {self.max_actors} CLIP actor{'s' * (self.max_actors != 1)} with {self.actor_cpus:g} CPU"
            if self.source == "streamed"
            else said
        )


def plan_training(settings: TrainSettings) -> TrainPlan:
    """Reach the cluster that the settings mean, if they mean one, and plan the run.

    Raises: UserError where no cluster answers, it lacks the device, or a flag does nothing with this source.
    """
    plan = _in_process(settings) if settings.num_workers == 0 and settings.source != "streamed" else _on_ray(settings)
    log.info("train: %s", plan.describe())
    return plan


def _on_ray(settings: TrainSettings) -> TrainPlan:
    connect(settings.ray_address)
    plan = make_plan(settings.device, settings.precision, Wishes(None, None, settings.decode_cpus))
    gpus = ray.cluster_resources().get("GPU", 0.0) if plan.device == "cuda" else 0.0
    source = choose_source(settings, gpus)
    return _gpu_plan(settings, plan, gpus, source) if plan.device == "cuda" else _cpu_plan(settings, plan, source)


def choose_source(settings: TrainSettings, gpus: float) -> TokenSource:
    """What `--source auto` means: streamed wants a GPU beside the trainer's.

    Raises: UserError where a flag of the actors is given and there are none.
    """
    source = settings.source
    if source == "auto":
        source = "cached" if settings.activations is not None else "streamed" if gpus >= 2 else "fused"
    if source != "streamed":
        for name in ("workers", "num_gpus", "decode_cpus"):
            if getattr(settings, name) is not None:
                raise UserError(f"--{name} is for --source streamed; tokens are {source} here")
    return source


def _in_process(settings: TrainSettings) -> TrainPlan:
    cuda = torch.cuda.is_available() and settings.device != "cpu"
    if settings.device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no GPU; cpu or auto would be right")
    device = "cuda" if cuda else "cpu"
    source = choose_source(settings, 1.0 if cuda else 0.0)
    threads, precision = torch.get_num_threads(), resolve_precision(settings.precision, device)
    return TrainPlan(device, 0, 0, 0.0, 0.0, 0.0, threads, precision, 0, 0.0, 0.0, source, on_ray=False)


def _cpu_plan(settings: TrainSettings, plan: Plan, source: TokenSource) -> TrainPlan:
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    cpus = [count for count in nodes if count > 0]
    workers = 1 if settings.num_workers is None else settings.num_workers
    here = max(1, math.ceil(workers / len(cpus)))  # on a machine
    share = math.floor(1000 * min(cpus) / here) / 1000
    threads = max(1, int(min(cpus) // here))
    if settings.num_gpus:
        raise UserError(f"--num_gpus {settings.num_gpus:g}: the model runs on CPUs here (--device {settings.device})")
    if source != "streamed":
        made = {**asdict(plan), "min_actors": 0, "max_actors": 0, "threads": threads}
        return TrainPlan(**made, num_workers=workers, worker_cpus=share / 2, worker_gpus=0.0, source=source, on_ray=True)
    low, high = _actors(settings, max(1, workers))
    decode = settings.decode_cpus or round(0.2 * share, 3)
    actor_cpus = round(0.3 * share * max(1, workers) / high, 3)
    made = {
        **asdict(plan), "min_actors": low, "max_actors": high, "actor_cpus": actor_cpus, "decode_cpus": decode,
        "threads": threads,
    }  # fmt: skip
    return TrainPlan(**made, num_workers=workers, worker_cpus=0.3 * share, worker_gpus=0.0, source=source, on_ray=True)


def _gpu_plan(settings: TrainSettings, plan: Plan, gpus: float, source: TokenSource) -> TrainPlan:
    streams = source == "streamed"
    fitting = max(1, int(gpus // 2) if streams else int(gpus))
    workers = fitting if settings.num_workers is None else settings.num_workers
    if workers == 0:
        raise UserError(
            "--num_workers 0 trains in the job's own process, where Ray reserves no GPU for it; with --source streamed, 1 or "
            "more would be right, or --device cpu"
        )
    made = {**asdict(plan), "min_actors": 0, "max_actors": 0}
    if streams:
        each = settings.num_gpus if settings.num_gpus is not None else 1.0
        left = max(1, int((gpus - workers) / each)) if each else 1
        low, high = _actors(settings, max(left, workers))
        made = {**made, "min_actors": low, "max_actors": high, "actor_gpus": each}
    return TrainPlan(**made, num_workers=workers, worker_cpus=1.0, worker_gpus=1.0, source=source, on_ray=True)


def _actors(settings: TrainSettings, default: int) -> tuple[int, int]:
    return settings.worker_bounds() or (default, default)
