"""What a part of a step takes, measured by torch's own account of its allocator, and how parts follow a GPU's memory."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from patchsae_ray.sae import memory, ops
from patchsae_ray.sae.ghost import ghost_gradients
from patchsae_ray.sae.gradients import Batch, active_by_latent, dense_pass, sparse_pass
from patchsae_ray.sae.memory import BYTES_A_LATENT, BYTES_A_PAIR, PART_BYTES, part_bytes
from patchsae_ray.sae.objective import Objective
from patchsae_ray.sae.schedules import Schedule
from patchsae_ray.sae.trainer import Trainer
from tests.gpu.pretend import pretended_cuda
from tests.sae.test_ops import make_sae, residual

WIDTH, LATENTS, TOKENS = 8, 4096, 1024
GIB = 2**30
H100 = torch.device("cuda", 0)


def peak_of(work: Callable[[], None]) -> int:
    """Bytes that torch has allocated at most, over what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measured(path: str, tokens: int, precision: str = "fp32") -> tuple[int, int]:
    """Peak of a pass with all its gradients, and the active pairs that it met."""
    sae, x = make_sae(WIDTH, LATENTS, 0).requires_grad_(True), residual(1, tokens, WIDTH)
    pairs: list[int] = []

    @torch.no_grad()
    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            run = dense_pass if path == "dense" else sparse_pass
            done = run(sae, Batch(x, None, tokens, None), Objective(use_ghost_grads=False))
            for _ in done.gradients:
                pass
        pairs.append(int(done.sums[-LATENTS:].sum()))

    work()
    return peak_of(work), pairs[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_a_latent_of_the_dense_path(precision: str) -> None:
    slope = (measured("dense", 2 * TOKENS, precision)[0] - measured("dense", TOKENS, precision)[0]) / (TOKENS * LATENTS)
    assert 0.7 * BYTES_A_LATENT < slope <= BYTES_A_LATENT


def test_bytes_a_pair_of_the_sparse_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SLICE_BYTES, "cpu", 2**17)
    (more, more_pairs), (less, less_pairs) = measured("sparse", 2 * TOKENS), measured("sparse", TOKENS)
    slope = (more - less) / (more_pairs - less_pairs)
    assert 0.6 * BYTES_A_PAIR < slope <= BYTES_A_PAIR


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slices_of_ghost_gradients_and_of_the_search(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SLICE_BYTES, "cpu", 2**22)
    sae, x = make_sae(WIDTH, LATENTS, 0), residual(1, 4 * TOKENS, WIDTH)
    silent = make_sae(WIDTH, LATENTS, 0)
    silent.b_enc.fill_(-100)

    def ghosts() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            ghost_gradients(sae, x, 0.9 * x, torch.arange(LATENTS), len(x))

    def search() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            active_by_latent(silent, x - silent.b_dec)

    for work in (ghosts, search):
        work()
        assert 2 < peak_of(work) / ops.SLICE_BYTES["cpu"] <= memory.SLICES_HELD


@pytest.mark.parametrize(("free", "wanted"), [(80, 28), (40, 28), (24, 14), (12, 7), (1, 0.109375)])
def test_parts_fit_in_what_is_free(free: int, wanted: float) -> None:
    with pretended_cuda(free * GIB):
        found = part_bytes(H100, GIB // 3, GIB)
    assert found == wanted * GIB
    assert found + 2 * GIB // 3 + memory.SLICES_HELD * GIB <= free * GIB or found < GIB / 4


def test_a_cpu_takes_its_bound() -> None:
    assert part_bytes(torch.device("cpu"), 10 * GIB, GIB) == PART_BYTES["cpu"]


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_gpu_with_little_memory_takes_more_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SLICE_BYTES, "cuda", 2**14)
    sizes = {}
    for free in (GIB, 2**20):
        with pretended_cuda(free):
            trainer = Trainer(make_sae(16, 80, 0).to("cuda"), Objective(), Schedule("constant", 9), path=path)  # type: ignore[arg-type]
            trainer.step(residual(0, 4000, 16).to("cuda"))
            sizes[free] = [len(batch.x) for batch in trainer._parts(residual(1, 4000, 16).to("cuda"), None, 4000, None)]
    assert sizes[GIB] == [4000]
    assert len(sizes[2**20]) > 3
    assert sum(sizes[2**20]) == 4000
