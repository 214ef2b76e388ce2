"""Gradients by way of the active latents against autograd of the objective, written out whole."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchsae_ray.sae import gradients, ops
from patchsae_ray.sae.gradients import GRADIENTS, Batch, Pass, dense_pass, sparse_pass
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.objective import Objective
from tests.sae.test_ops import make_sae, residual


@dataclass(frozen=True)
class Plain:
    """The whole objective and its gradients."""

    mse: float
    ghost: float
    gradients: dict[str, Tensor]


def plain(sae: SparseAutoencoder, x: Tensor, objective: Objective, cls: Tensor, dead: Tensor, num_tokens: int) -> Plain:
    """By autograd in float64, all terms in one graph, as `REFERENCE` writes them; W_dec's gradient turned and not stretched."""
    weights = {name: value.detach().double().requires_grad_(True) for name, value in sae.named_parameters()}
    x = x.double()
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    z = pre.relu()
    reconstruction = z @ weights["W_dec"] + weights["b_dec"]
    norm = x.norm(dim=1, keepdim=True)
    mse = (reconstruction - x) ** 2 / norm
    r = (x - reconstruction).detach()
    g = torch.exp(pre[:, dead]) @ weights["W_dec"][dead]
    scaled = g * (r.norm(dim=1, keepdim=True) / (1e-6 + 2 * g.norm(dim=1, keepdim=True))).detach()
    error = (scaled - r) ** 2 / r.norm(dim=1, keepdim=True)
    ghost = (error * (mse / (error + 1e-6)).detach()).sum() / (num_tokens * x.shape[1])
    if len(dead) == 0:
        ghost = ghost.detach() * 0
    factor = torch.where(cls, objective.mse_cls_coefficient, 1.0)[:, None]
    weighed = (mse * factor).sum() / (num_tokens * x.shape[1])
    (weighed + objective.l1_coefficient * z.sum() / num_tokens + ghost).backward()
    found = {name: value.grad for name, value in weights.items() if value.grad is not None}
    rows = weights["W_dec"].detach()
    found["W_dec"] = found["W_dec"] - (found["W_dec"] * rows).sum(dim=1, keepdim=True) * rows
    return Plain(weighed.item(), ghost.item(), found)


@torch.no_grad()
def run(path: str, sae: SparseAutoencoder, batch: Batch, objective: Objective) -> tuple[Pass, dict[str, Tensor]]:
    done = (sparse_pass if path == "sparse" else dense_pass)(sae.requires_grad_(True), batch, objective)
    found = dict(zip(GRADIENTS, done.gradients, strict=True))
    return done, {**found, "W_enc": found["W_enc"].t()}


def check(path: str, sae: SparseAutoencoder, batch: Batch, objective: Objective) -> None:
    dead = torch.zeros(0, dtype=torch.int64) if batch.dead is None else batch.dead
    cls = torch.zeros(len(batch.x), dtype=torch.bool) if batch.cls is None else batch.cls
    exact = plain(sae, batch.x, objective, cls, dead, batch.num_tokens)
    done, found = run(path, sae, batch, objective)
    assert done.sums[:2].tolist() == pytest.approx([exact.mse, exact.ghost], rel=1e-5, abs=1e-12)
    z = sae.encode(batch.x).detach()
    assert torch.equal(done.sums[-sae.d_sae :], (z > 0).sum(dim=0).double())
    largest = max(float(gradient.abs().max()) for gradient in exact.gradients.values())
    rounding = 2e-5 if batch.dead is None else 5e-3  # a ghost term divides by errors that may be all but 0
    for name, gradient in exact.gradients.items():
        assert found[name].shape == gradient.shape
        assert (found[name] - gradient).abs().max() <= rounding * max(float(gradient.abs().max()), 1e-2 * largest), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 30),
    latents=st.integers(1, 60),
    bias=st.floats(-4, 2),
    cls_coefficient=st.sampled_from([0.0, 1.0, 7.0]),
    l1=st.sampled_from([0.0, 8e-5, 0.3]),
    dead_share=st.sampled_from([None, 0.1, 1.0]),
    others=st.integers(0, 50),
)
def test_both_paths_equal_the_definition(
    seed: int, tokens: int, latents: int, bias: float, cls_coefficient: float, l1: float, dead_share: float | None, others: int
) -> None:
    sae, x = make_sae(12, latents, seed), residual(seed + 1, tokens, 12)
    sae.b_enc.add_(bias)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(latents, generator=generator)[: max(1, round(latents * (dead_share or 0)))]
    cls = torch.rand(tokens, generator=generator) < 0.3
    batch = Batch(x, cls, tokens + others, None if dead_share is None else chosen.sort().values)
    objective = Objective(l1, cls_coefficient)
    for path in ("sparse", "dense"):
        check(path, sae, batch, objective)


def test_no_latent_active_anywhere() -> None:
    sae, x = make_sae(12, 40, 1), residual(2, 7, 12)
    sae.b_enc.fill_(-100)
    check("sparse", sae, Batch(x, None, 7, None), Objective())
    with torch.no_grad():
        assert len(gradients.active_by_latent(sae, x - sae.b_dec).value) == 0


def test_slices_and_the_parts_of_ghosts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SLICE_BYTES, "cpu", 4 * 9 * 7)  # 7 latents a slice
    sae, x = make_sae(12, 50, 1), residual(2, 9, 12)
    check("sparse", sae, Batch(x, None, 9, torch.arange(0, 50, 2)), Objective())


def test_active_latents_are_in_order_and_counted() -> None:
    sae, x = make_sae(12, 50, 1), residual(2, 9, 12)
    z = sae.encode(x)
    active = gradients.active_by_latent(sae, x - sae.b_dec)
    assert torch.equal(torch.stack([active.latent, active.token], dim=1), z.t().nonzero())
    assert torch.allclose(active.value, z[active.token, active.latent], atol=1e-6)
    assert torch.equal(active.counts, (z > 0).sum(dim=0))
    assert torch.allclose(gradients.decode(sae, active, 9), sae.decode(z), atol=1e-5)


@pytest.mark.parametrize("where", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_not_a_number_is_not_skipped(where: str) -> None:
    sae, x = make_sae(12, 50, 1), residual(2, 9, 12)
    sae.b_enc[0] = 50
    getattr(sae, where).view(-1)[0] = float("nan")
    done, _ = run("sparse", sae, Batch(x, None, 9, None), Objective())
    assert not done.sums[0].isfinite()


def test_autocast_encodes_in_bf16_and_decodes_in_float32() -> None:
    sae, x = make_sae(64, 200, 8), residual(9, 40, 64)
    batch = Batch(x, None, 40, None)
    _, full = run("sparse", sae, batch, Objective())
    with torch.autocast("cpu", torch.bfloat16):
        _, low = run("sparse", sae, batch, Objective())
    assert all(gradient.dtype == torch.float32 for gradient in low.values())
    for name, gradient in full.items():
        assert 0 < ((low[name] - gradient).norm() / gradient.norm()).item() < 0.1, name
