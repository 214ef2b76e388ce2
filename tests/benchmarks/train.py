"""Tokens a second of one training step at 49,152 latents, beside the plain dense step by autograd.

    python tests/benchmarks/train.py [--device cuda] [--images 16] [--steps 3]

768 → 49,152 latents in fp32, random directions, biases set for about 150 active latents a token, no ghost term, 197 tokens
an image drawn from a normal distribution, so that every latent fires on a few: the worst case for a cache. The learning rate
is 1e-6, so that the number of active latents stays. Ours is the Trainer on the path that it chooses itself (dense in its
first step, the warm-up, before which it does not know how many latents are active; sparse from then on); the plain step
is autograd of the same objective over dense latents with torch.optim.Adam. Steps of the two alternate; medians are compared,
and beforehand the gradients of both at the same weights. Peak memory is that of a process of its own with two steps of
one of them, sparse from the first on: all that is resident, the interpreter too; on a GPU what torch allocated there.

On a GPU `matmul_peak_share` is the model's FLOP of a step (a dense encode and four products with the active latents) over
its time and over the rate of the largest fp32 matrix product of the same run. The last line is one JSON object. Needs torch
and this package; no Ray.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from patchsae_ray.measure.stages import peak_bytes
from patchsae_ray.sae.gradients import GRADIENTS, Batch, sparse_pass
from patchsae_ray.sae.model import SparseAutoencoder, initialise, normalise_decoder
from patchsae_ray.sae.objective import Objective, loss_terms
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Path as GradientPath
from patchsae_ray.sae.trainer import Trainer

LATENTS, WIDTH, L0, TOKENS, LR = 49_152, 768, 150, 197, 1e-6
OBJECTIVE = Objective(use_ghost_grads=False)
Step = Callable[[Tensor], float]


def make_sae(x: Tensor) -> SparseAutoencoder:
    """Random directions, the encoder's bias such that about L0 latents are active on a token."""
    sae = SparseAutoencoder(WIDTH, LATENTS).requires_grad_(False)
    initialise(sae, torch.Generator().manual_seed(0))
    sae.to(x.device)
    levels = sae.pre_activations(x[::16]).flatten()[::7].cpu()[:10_000_000]
    sae.b_enc.fill_(-torch.quantile(levels, 1 - L0 / LATENTS).item())
    return sae.requires_grad_(True)


def make_ours(x: Tensor, path: GradientPath = "auto") -> tuple[Trainer, Step]:
    """The trainer, and its step, which gives the mean number of active latents."""
    trainer = Trainer(make_sae(x), OBJECTIVE, Schedule("constant", 1000), LR, path=path)
    return trainer, lambda batch: trainer.step(batch).l0


def plain_backward(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The objective and its gradients; tokens on which each latent fired [s]."""
    terms = loss_terms(sae, x, OBJECTIVE)
    (terms.mse + terms.l1).backward()
    rows, gradient = sae.W_dec.detach(), sae.W_dec.grad
    assert gradient is not None
    gradient.sub_((gradient * rows).sum(dim=1, keepdim=True) * rows)
    return (terms.latents.detach() > 0).sum(dim=0)


def make_plain(x: Tensor) -> Step:
    """What the released code does in a step."""
    sae = make_sae(x)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(batch: Tensor) -> float:
        normalise_decoder(sae)
        optimiser.zero_grad()
        counts = plain_backward(sae, batch)
        optimiser.step()
        return float(counts.sum()) / len(batch)

    return step


def check_gradients(x: Tensor) -> None:
    """Both ways at the same weights: the norm of the difference over the norm, for each parameter.

    A latent within rounding of 0 is active one way and not the other, with a gradient of any size: such latents are counted
    and left out, and of b_dec's gradient the part that comes by way of the latents.
    """
    sae = make_sae(x)
    counts = plain_backward(sae, x)
    with torch.no_grad():
        done = sparse_pass(sae, Batch(x, None, len(x), None), OBJECTIVE)
        ours = dict(zip(GRADIENTS, done.gradients, strict=True))
        plain = {name: weight.grad for name, weight in sae.named_parameters() if weight.grad is not None}
        plain["W_enc"] = plain["W_enc"].t()
        for found in (ours, plain):
            found["b_dec"] = found["b_dec"] + sae.W_enc @ found["b_enc"]
    same = done.sums[-LATENTS:] == counts
    kept = {name: slice(None) if name == "b_dec" else same for name in GRADIENTS}
    apart = {name: float((ours[name] - plain[name])[kept[name]].norm() / plain[name].norm()) for name in GRADIENTS}
    print("gradients apart by", apart, "latents left out:", int((~same).sum()), flush=True)
    assert max(apart.values()) < 1e-5
    assert int((~same).sum()) < LATENTS / 1000


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def timed(step: Step, x: Tensor) -> tuple[float, float]:
    """Seconds of a step, and what it gives."""
    found: list[float] = []
    return seconds_of(lambda: found.append(step(x)), x.device.type), found[0]


def matmul_rate(device: str) -> float:
    """FLOP/s of a large fp32 matrix product, the best of five."""
    left, right = torch.randn(8192, 8192, device=device), torch.randn(8192, 8192, device=device)
    return 2 * 8192**3 / min(seconds_of(lambda: left @ right, device) for _ in range(5))


def measure_peak(which: str, x: Tensor) -> None:
    """In a process of its own: two steps of one of the two, and the peak."""
    step = make_ours(x, "sparse")[1] if which == "sparse" else make_plain(x)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(x)
    print(torch.cuda.max_memory_allocated() if x.is_cuda else peak_bytes())


def peak_of(which: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--device", options.device, "--images", str(options.images), "--peak_of", which]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peak_of", choices=["sparse", "dense"], help="only that one's peak memory, in bytes")
    options = parser.parse_args()
    device = options.device
    x = torch.randn(options.images * TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    if options.peak_of:
        measure_peak(options.peak_of, x)
        return
    peaks = {which: peak_of(which, options) for which in ("sparse", "dense")}
    check_gradients(x)
    (trainer, ours), plain = make_ours(x), make_plain(x)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for index in range(options.steps + 1):
        one, active = timed(ours, x)
        other, active_plain = timed(plain, x)
        print(f"seconds a step: ours {one:.3f}, plain {other:.3f}, active latents {active:.1f}, {active_plain:.1f}", flush=True)
        if index:  # the first is a warm-up
            times["ours"].append(one)
            times["plain"].append(other)
    found = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "tokens_per_second": len(x) / found["ours"],
        "tokens_per_second_dense": len(x) / found["plain"],
        "speedup": found["plain"] / found["ours"],
        "peak_bytes": peaks,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    if device == "cuda":
        result["matmul_peak_share"] = trainer.flops_last_step / found["ours"] / matmul_rate(device)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
