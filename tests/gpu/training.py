"""Training steps on a device against the CPU. Needs torch, numpy and safetensors alone."""

import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from patchsae_ray.sae.collective import Alone, Collective, Distributed
from patchsae_ray.sae.gradients import GRADIENTS, Batch, Pass, dense_pass, sparse_pass
from patchsae_ray.sae.memory import BYTES_A_LATENT, BYTES_A_PAIR
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Path, Trainer
from tests.gpu.figures import Figure, apart, at_most, has_gpu, unequal
from tests.gpu.operations import make_sae, normal

TOKENS, WIDTH, LATENTS, STEPS = 400, 64, 1000, 4
OBJECTIVE = Objective(1e-3, mse_cls_coefficient=3.0)
CLS = torch.arange(TOKENS) % 5 == 0
GRADIENT_BOUNDS = {"fp32": 1e-4, "bf16": 3e-2}
"""Against fp32; a latent within rounding of 0 may have a gradient one way and none the other."""


def in_precision(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def gradients_of(run: Callable[..., Pass], device: str, precision: str = "fp32", ghosts: bool = True) -> dict[str, Tensor]:
    """A pass's gradients; in fp32 a few latents are under ghost gradients, which bf16 leaves a few correct bits of."""
    sae = make_sae(WIDTH, LATENTS).to(device).requires_grad_(True)
    dead = torch.arange(0, LATENTS, 50, device=device) if precision == "fp32" and ghosts else None
    with torch.no_grad(), in_precision(device, precision):
        done = run(sae, Batch(normal(1, TOKENS, WIDTH).to(device), CLS.to(device), TOKENS, dead), OBJECTIVE)
        found = dict(zip(GRADIENTS, done.gradients, strict=True))
    return {**found, "terms": done.sums[:2]}


def gradients(device: str) -> list[Figure]:
    """Both paths in fp32 and bf16 against autograd in fp32 on the CPU."""
    figures: list[Figure] = []
    for run in (dense_pass, sparse_pass):
        for precision, bound in GRADIENT_BOUNDS.items():
            plain, found = gradients_of(dense_pass, "cpu", ghosts=precision == "fp32"), gradients_of(run, device, precision)
            figures += [apart(f"{run.__name__} {precision} {name}", found[name], plain[name], bound) for name in plain]
        again = gradients_of(run, device)
        figures += [unequal(f"{run.__name__} {name}, repeated", again[name], gradients_of(run, device)[name]) for name in plain]
    return figures


def make_trainer(device: str, path: Path, collective: Collective | None = None) -> Trainer:
    schedule = Schedule("constantwithwarmup", 20, warm_up_steps=4)
    sae = make_sae(WIDTH, LATENTS, -1.3).to(device)
    return Trainer(sae, OBJECTIVE, schedule, 1e-3, dead_feature_window=1, path=path, collective=collective or Alone())


def train(trainer: Trainer, steps: range) -> Tensor:
    """Loss terms of each step, [steps, 4]."""
    device, rows = trainer.sae.W_enc.device, []
    for step in steps:
        done = trainer.step(normal(step, TOKENS, WIDTH).to(device), CLS.to(device))
        rows.append([done.mse_loss, done.l1_loss, done.mse_loss_ghost_resid, done.l0])
    return torch.tensor(rows, dtype=torch.float64)


def steps(device: str) -> list[Figure]:
    """Steps on both paths, with ghost gradients; a resume from the middle goes on bit for bit."""
    figures: list[Figure] = []
    for path in ("dense", "sparse"):
        plain, ours, resumed = make_trainer("cpu", path), make_trainer(device, path), make_trainer(device, path)
        wanted, found = train(plain, range(STEPS)), train(ours, range(2))
        resumed.load_state({name: value.clone() for name, value in ours.state().items()})
        found = torch.cat([found, train(ours, range(2, STEPS))])
        train(resumed, range(2, STEPS))
        figures.append(apart(f"{path}: loss terms", found, wanted, 1e-4))
        figures += [unequal(f"{path}: {name}, resumed", resumed.state()[name], ours.state()[name]) for name in ours.state()]
        ours_window, plain_window = ours.window_result().as_metrics(), plain.window_result().as_metrics()
        both = [torch.tensor([one[name] for name in plain_window]) for one in (ours_window, plain_window)]
        figures.append(apart(f"{path}: window", *both, 1e-4))
    return figures


def steps_in_bf16(device: str) -> list[Figure]:
    """Loss terms of steps under autocast, against fp32 on the CPU."""
    figures = []
    for path in ("dense", "sparse"):
        wanted = train(make_trainer("cpu", path), range(STEPS))
        with in_precision(device, "bf16"):
            found = train(make_trainer(device, path), range(STEPS))
        figures.append(apart(f"{path}: loss terms", found, wanted, 2e-2))
    return figures


def collectives(device: str) -> list[Figure]:
    """A group of one: NCCL on a GPU, gloo elsewhere; sums are the tensors themselves, compressed ones rounded to bf16."""
    backend = "nccl" if has_gpu(device) else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, f"file://{folder}/group", timedelta(seconds=60), world_size=1, rank=0)
        try:
            figures = []
            for dtype in (torch.int64, torch.float32, torch.float64, torch.bfloat16):
                tensor = torch.arange(7, device=device).to(dtype)
                Distributed().sum_(tensor)
                figures.append(unequal(f"sum of {dtype}", tensor, torch.arange(7).to(dtype)))
            plain = train(make_trainer(device, "sparse"), range(2))
            found = train(make_trainer(device, "sparse", Distributed()), range(2))
            low = train(make_trainer(device, "sparse", Distributed(compress=True)), range(2))
            return [*figures, unequal("steps", found, plain), apart("steps with compressed gradients", low, plain, 1e-3)]
        finally:
            dist.destroy_process_group()


def peak_memory(device: str) -> list[Figure]:
    """Peak bytes a latent and a pair, of passes large enough for the rest not to count; only a GPU has this account."""
    if not has_gpu(device):
        return []
    figures = []
    for precision in ("fp32", "bf16"):
        for run, bound in ((dense_pass, BYTES_A_LATENT), (sparse_pass, BYTES_A_PAIR)):
            slopes = [_peak(run, device, tokens, precision) for tokens in (8192, 16_384)]
            (less, few), (more, many) = slopes
            figures.append(at_most(f"{run.__name__} {precision}: bytes each", (more - less) / (many - few), bound))
    return figures


def _peak(run: Callable[..., Pass], device: str, tokens: int, precision: str) -> tuple[int, int]:
    """Peak of a pass, and what it is a multiple of: latents of all tokens, or active pairs."""
    sae, x = make_sae(WIDTH, 32_768, -0.2).to(device).requires_grad_(True), normal(1, tokens, WIDTH).to(device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad(), in_precision(device, precision):
        done = run(sae, Batch(x, None, tokens, None), Objective(use_ghost_grads=False))
        for _ in done.gradients:
            pass
    peak = torch.cuda.max_memory_allocated() - before
    return peak, tokens * sae.d_sae if run is dense_pass else int(done.sums[-sae.d_sae :].sum())


CASES = (gradients, steps, steps_in_bf16, collectives, peak_memory)
