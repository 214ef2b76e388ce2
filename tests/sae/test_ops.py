"""Each fast operation against its plain definition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import embedding_bag

from patchsae_ray.sae import ops
from patchsae_ray.sae.model import SparseAutoencoder, geometric_median, initialise, normalise_decoder
from patchsae_ray.sae.ops import sums_by_cell


def make_sae(d_in: int, d_sae: int, seed: int) -> SparseAutoencoder:
    sae = SparseAutoencoder(d_in, d_sae)
    generator = torch.Generator().manual_seed(seed)
    initialise(sae, generator)
    with torch.no_grad():
        sae.b_enc.normal_(-0.5, 0.5, generator=generator)
        sae.b_dec.normal_(0, 0.3, generator=generator)
    return sae.requires_grad_(False)


def residual(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TYPES = torch.tensor([0, 1, 1, 1, 2])


@pytest.mark.parametrize("slice_bytes", [4, 4 * 3 * 5 * 7, 2**26])
def test_reduce_latents(monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    monkeypatch.setitem(ops.SLICE_BYTES, "cpu", slice_bytes)
    sae, x = make_sae(12, 50, 1), residual(2, 3, 5, 12)
    keep = torch.tensor([True, False, True])
    fast, active = ops.reduce_latents(sae, x, (0.2, 0.7), TYPES, keep)
    plain = ops.reduce_latents_plain(sae, x, (0.2, 0.7), TYPES)
    assert torch.allclose(fast.sums, plain.sums, atol=1e-6)
    assert torch.allclose(fast.means, sae.encode(x).mean(dim=1), atol=1e-6)
    assert torch.equal(fast.counts, plain.counts)
    assert (plain.counts[0].sum() > plain.counts[1].sum() > 0).all()
    assert torch.equal(fast.histogram, plain.histogram)
    assert fast.histogram.sum() == (sae.encode(x) > 0).sum()
    assert active is not None
    assert torch.allclose(ops.sparse_decode(sae, active).view(2, 5, 12), sae.decode(sae.encode(x[keep])), atol=1e-5)


def test_active_latents_are_given_where_they_are_wanted() -> None:
    sae, x = make_sae(12, 50, 1), residual(2, 3, 5, 12)
    assert ops.reduce_latents(sae, x, (0.2,), TYPES)[1] is None
    assert ops.reduce_latents(sae, x, (0.2,), TYPES, torch.zeros(3, dtype=torch.bool))[1] is None


def test_histogram_bins_are_octaves() -> None:
    values = torch.tensor([2.0**-30, 2.0**-20, 2.0**-19, 0.2499999, 0.25, 0.49, 1.0, 3.9, 2.0**11, 2.0**40])
    assert ops.histogram_bin(values).tolist() == [0, 0, 1, 17, 18, 18, 20, 21, 31, 31]


def test_slices_cover_each_latent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SLICE_BYTES, "cpu", 4 * 10 * 7)
    parts = list(ops.slices(50, 10))
    assert [latent for part in parts for latent in range(part.start, part.stop)] == list(range(50))
    assert max(part.stop - part.start for part in parts) == 7


def test_sparse_decode_equals_dense() -> None:
    sae, x = make_sae(12, 50, 3), residual(4, 2, 5, 12)
    active = ops.active_latents(sae, x)
    assert torch.allclose(ops.sparse_decode(sae, active).view(2, 5, 12), sae.decode(sae.encode(x)), atol=1e-5)
    assert len(active.value) == int((sae.encode(x) > 0).sum())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 3),
    tokens=st.integers(1, 6),
    latents=st.integers(2, 40),
    data=st.data(),
)
def test_masked_reconstructions_equal_mask_and_decode(
    seed: int, images: int, tokens: int, latents: int, data: st.DataObject
) -> None:
    sae, x = make_sae(8, latents, seed), residual(seed + 1, images, tokens, 8)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(latents, generator=generator) for _ in range(images)])
    # repeats, and numbers past the active ones and past the width, are allowed
    ks = torch.tensor(sorted(data.draw(st.lists(st.integers(1, latents + 3), min_size=1, max_size=6))))
    on, off = ops.masked_reconstructions(sae, ops.active_latents(sae, x), ranks, ks)
    plain_on, plain_off = ops.masked_reconstructions_plain(sae, x, ranks, ks)
    assert torch.allclose(on, plain_on, atol=1e-4)
    assert torch.allclose(off, plain_off, atol=1e-4)


def test_bf16_products_stay_close_and_decode_in_float32() -> None:
    sae, x = make_sae(64, 200, 8), residual(9, 1, 5, 64)
    ranks, ks = torch.randperm(200, generator=torch.Generator().manual_seed(0))[None], torch.tensor([20, 200])
    full = ops.masked_reconstructions(sae, ops.active_latents(sae, x), ranks, ks)
    low = make_sae(64, 200, 8).cast_encoder(torch.bfloat16)
    found = ops.masked_reconstructions(low, ops.active_latents(low, x.to(torch.bfloat16)), ranks, ks)
    for ours, exact in zip(found, full, strict=True):
        assert ours.dtype == torch.float32
        assert ((ours - exact).norm() / exact.norm()).item() < 2e-2


def test_no_active_latent_decodes_to_the_bias() -> None:
    sae = make_sae(8, 20, 5)
    sae.b_enc.fill_(-100)
    active = ops.active_latents(sae, residual(6, 1, 4, 8))
    on, off = ops.masked_reconstructions(sae, active, torch.arange(20)[None], torch.tensor([1, 20]))
    assert torch.equal(on, sae.b_dec.expand(1, 2, 4, 8))
    assert torch.equal(off, on)


@pytest.mark.parametrize("part", [slice(0, 5), slice(1, 5), slice(0, 1), slice(2, 4)])
def test_active_latents_within_a_run_of_tokens(part: slice) -> None:
    sae, x = make_sae(12, 50, 1), residual(2, 3, 5, 12)
    inside = ops.active_latents(sae, x).within(5, part)
    assert inside.num_tokens == 3 * (part.stop - part.start)
    assert torch.allclose(ops.sparse_decode(sae, inside).view(3, -1, 12), sae.decode(sae.encode(x[:, part])), atol=1e-5)


def test_image_means() -> None:
    sae, x = make_sae(12, 50, 1), residual(2, 3, 5, 12)
    assert torch.allclose(ops.active_latents(sae, x).image_means(3, 50), sae.encode(x).mean(dim=1), atol=1e-6)


def test_initialisation_is_patchsaes() -> None:
    sae = SparseAutoencoder(16, 1024)
    initialise(sae, torch.Generator().manual_seed(0))
    bound = (6 / 1024) ** 0.5
    assert sae.W_enc.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(1024), atol=1e-6)
    assert sae.b_enc.abs().max() == 0


def test_geometric_median_of_a_known_case() -> None:
    # Of the corners of a triangle with an angle of 120 degrees the corner at that angle is the median.
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.5, 3**0.5 / 2]])
    assert torch.allclose(geometric_median(points, max_steps=2000, tolerance=0), torch.zeros(2), atol=1e-2)
    spread = torch.cat([torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), torch.full((20, 3), 1000.0)])
    assert geometric_median(spread).norm() < 0.5 < spread.mean(dim=0).norm()


def test_normalise_decoder() -> None:
    sae = make_sae(8, 20, 7)
    sae.W_dec.mul_(3)
    normalise_decoder(sae)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(20))


def test_sums_by_cell_equal_the_definition_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    cell = torch.randint(0, 40, (3000,), generator=generator)
    cell[cell == 7] = 8  # an empty cell between others
    value = torch.rand(3000, dtype=torch.float64, generator=generator)
    wanted = [sum(value[cell == one].tolist(), 0.0) for one in range(45)]
    assert sums_by_cell(cell, value, 45).tolist() == wanted
    assert sums_by_cell(cell[:0], value[:0], 3).tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 40]), min_size=1, max_size=12),
    piece=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_sums_in_pieces_equal_whole_bags(sizes: list[int], piece: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table, count = torch.randn(11, 5, generator=generator), sum(sizes)
    rows, weights = torch.randint(11, (count,), generator=generator), torch.rand(count, generator=generator)
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    bag = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    expected = torch.zeros(len(sizes), 5).index_add_(0, bag, table[rows] * weights[:, None])
    found = ops.in_pieces(table, rows, starts, weights, piece)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found, ops.in_pieces(table, rows, starts, weights, piece))
    assert torch.allclose(ops.weighed_sums(table, rows, starts, weights), expected, atol=1e-5)


def test_no_bag_is_walked_past_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []

    def watched(rows: Tensor, table: Tensor, starts: Tensor, **arguments: Any) -> Tensor:
        longest.append(int(torch.diff(starts, append=torch.tensor([len(rows)])).max()))
        return embedding_bag(rows, table, starts, **arguments)

    monkeypatch.setattr(ops, "embedding_bag", watched)
    rows = torch.arange(25_000) % 7
    ops.in_pieces(torch.randn(7, 4), rows, torch.tensor([0, 3, 24_900]), torch.ones(25_000), ops.PIECE)
    assert longest[0] <= ops.PIECE
    assert longest[1] <= 1 + 25_000 // ops.PIECE
