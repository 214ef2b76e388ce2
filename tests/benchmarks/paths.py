"""Where the two ways of computing a training step's gradients take equally long, by the share of active latents.

    python tests/benchmarks/paths.py [--device cuda] [--tokens 4096] [--latents 49152] [--repeats 3]

768 → 49,152 latents, random directions, biases set for each share of active latents in turn, no ghost term, tokens drawn from
a normal distribution; gradients alone, in fp32 and, under autocast, in bf16. `crossing` is where a straight line between
the two neighbouring shares, of the logarithm of the times' ratio over the logarithm of the share, meets 1: what SPARSE_BELOW
(sae/trainer.py) should say; null where the sparse way is the faster one, or the slower one, at every share. The last line is
one JSON object. Needs torch and this package; no Ray.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from patchsae_ray.sae.gradients import Batch, dense_pass, sparse_pass
from patchsae_ray.sae.model import SparseAutoencoder, initialise
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.trainer import SPARSE_BELOW
from tests.benchmarks.train import seconds_of

WIDTH = 768
SHARES = {"cpu": (0.01, 0.03, 0.1, 0.2, 0.3), "cuda": (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)}
OBJECTIVE = Objective(use_ghost_grads=False)


def make_sae(x: Tensor, latents: int) -> tuple[SparseAutoencoder, Tensor]:
    """Random directions, and some pre-activations on x with biases of 0, of which a share's bias is a quantile."""
    sae = SparseAutoencoder(x.shape[1], latents).requires_grad_(False)
    initialise(sae, torch.Generator().manual_seed(0))
    sae.to(x.device)
    return sae.requires_grad_(True), sae.pre_activations(x[::16]).detach().flatten()[::7].cpu()[:10_000_000]


@torch.no_grad()
def seconds_by_path(sae: SparseAutoencoder, x: Tensor, precision: str, repeats: int) -> dict[str, float]:
    """Median seconds of each way."""
    device = x.device.type
    found = {}
    for run in (dense_pass, sparse_pass):

        def work(run: object = run) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                for _ in run(sae, Batch(x, None, len(x), None), OBJECTIVE).gradients:  # type: ignore[operator]
                    pass

        work()
        found[run.__name__] = statistics.median(seconds_of(work, device) for _ in range(repeats))
    return found


def crossing_of(ratios: dict[float, float]) -> float | None:
    """The share at which the ratio of sparse to dense seconds, which grows with it, is 1."""
    shares = sorted(ratios)
    for low, high in itertools.pairwise(shares):
        if ratios[low] < 1 <= ratios[high]:
            a, b = math.log(ratios[low]), math.log(ratios[high])
            return math.exp(math.log(low) - a / (b - a) * (math.log(high) - math.log(low)))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=49_152)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = options.device
    x = torch.randn(options.tokens, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    sae, levels = make_sae(x, options.latents)
    ratios: dict[str, dict[float, float]] = {"fp32": {}, "bf16": {}}
    for share in SHARES[device]:
        sae.b_enc.data.fill_(-torch.quantile(levels, 1 - share).item())
        for precision, found in ratios.items():
            seconds = seconds_by_path(sae, x, precision, options.repeats)
            found[share] = seconds["sparse_pass"] / seconds["dense_pass"]
            times = f"dense {1000 * seconds['dense_pass']:.2f} ms, sparse {1000 * seconds['sparse_pass']:.2f} ms"
            print(f"{precision}, a share of {share}: {times}", flush=True)
    result = {
        "crossing": {precision: crossing_of(found) for precision, found in ratios.items()},
        "sparse_below": SPARSE_BELOW[device],
        "sparse_over_dense": {
            precision: {str(share): ratio for share, ratio in found.items()} for precision, found in ratios.items()
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
