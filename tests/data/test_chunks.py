"""The order of training tokens: every token once an epoch, the same for any number of workers, found again by its cursors."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray.data.chunks import ChunkTable, Demand, Drawing, LaneOrder, Wanted, num_lanes
from patchsae_ray.data.mixing import (
    ChunkTokens,
    TokenBatch,
    TokenMixer,
    distinct_images,
    expected_distinct_images,
)
from patchsae_ray.errors import UserError

T = 5
EDGES = np.array([0, 40, 80, 103])  # three units, the last one short


def order_of(lanes: int = 4, batch: int = 60, epochs: float = 1, chunk: int = 16, **drawing: object) -> LaneOrder:
    drawn = replace(Drawing("tokens", T, 1.0, batch), **drawing)  # type: ignore[arg-type]
    table = ChunkTable(EDGES, chunk)
    total = round(epochs * int(EDGES[-1]) * drawn.kept_tokens / drawn.draw_tokens)
    return LaneOrder(table, drawn, lanes, seed=3, total=total)


def named_tokens(asked: Iterator[Wanted], unreadable: frozenset[int] = frozenset()) -> Iterator[tuple[Wanted, ChunkTokens]]:
    """Tokens whose one value says which image and place they are of: position * T + place."""
    for one in asked:
        first = int(EDGES[one.chunk.unit]) + one.chunk.first
        every = np.arange(first, first + one.chunk.count)
        readable = np.array([position for position in every if position not in unreadable], dtype=np.int64)
        values = torch.from_numpy(readable[:, None] * T + np.arange(T)).to(torch.float32)[:, :, None]
        bad = [(int(position), f"image {position}", "torn") for position in every if position in unreadable]
        yield one, ChunkTokens(values, readable, bad)


def mixer(
    order: LaneOrder,
    rank: int = 0,
    size: int = 1,
    cursors: np.ndarray | None = None,
    step: int = 0,
    **how: frozenset[int],
) -> TokenMixer:
    lanes = range(rank, order.lanes, size)
    start = np.zeros((order.lanes, 2), np.int64) if cursors is None else cursors
    demand = Demand(order, lanes, start, step)
    return TokenMixer(order, lanes, demand, named_tokens(demand, **how), start, 0)


def batches(order: LaneOrder, **how: frozenset[int]) -> list[TokenBatch]:
    found = mixer(order, **how)
    return [found.step(step) for step in range(order.steps)]


def drawn(parts: list[TokenBatch]) -> list[int]:
    return [int(value) for part in parts for value in part.x.flatten()]


def test_chunks_cover_each_image_once() -> None:
    table = ChunkTable(EDGES, 16)
    found = [table[number] for number in range(len(table))]
    places = [int(EDGES[chunk.unit]) + chunk.first + index for chunk in found for index in range(chunk.count)]
    assert places == list(range(103))
    assert max(chunk.count for chunk in found) == 16


@pytest.mark.parametrize("batching", ["tokens", "images"])
def test_with_all_chunks_in_the_buffer_an_epoch_has_each_token_once(batching: str) -> None:
    batch = 60 if batching == "tokens" else 12
    order = order_of(lanes=8, batch=batch, batching=batching)
    seen = drawn(batches(order))
    missed = set(range(103 * T)) - set(seen)
    assert len(seen) == 103 * T
    assert len(missed) < 0.25 * 103 * T  # lanes with the short chunks have gone on to the next epoch's
    twice = drawn(batches(replace(order, total=2 * order.total)))
    assert max(np.bincount(twice, minlength=103 * T)) <= 3
    assert set(twice) == set(range(103 * T))


def test_chunks_of_an_epoch_come_once_each_and_another_epoch_another_order() -> None:
    order = order_of(lanes=3)
    count = len(order.table)
    found = [order.chunk(number % 3, number // 3) for number in range(2 * count)]
    assert {epoch for epoch, _ in found[:count]} == {0}
    assert {(chunk.unit, chunk.first) for _, chunk in found[:count]} == {(c.unit, c.first) for _, c in found[count:]}
    assert [chunk for _, chunk in found[:count]] != [chunk for _, chunk in found[count:]]


@settings(deadline=None, max_examples=25)
@given(
    size=st.sampled_from([1, 2, 3, 4]),
    lanes=st.sampled_from([4, 7]),
    batch=st.integers(7, 90),
    batching=st.sampled_from(["tokens", "images"]),
    share=st.sampled_from([1.0, 0.5]),
)
def test_any_number_of_workers_draws_the_same_global_batches(
    size: int, lanes: int, batch: int, batching: str, share: float
) -> None:
    order = order_of(lanes, batch, 1.5, batching=batching, share=share)
    alone = mixer(order)
    team = [mixer(order, rank, size) for rank in range(size)]
    for step in range(order.steps):
        together = [one.step(step) for one in team]
        whole = alone.step(step)
        shares = order.shares(step) * order.drawing.draw_tokens
        starts = np.cumsum(shares) - shares
        placed = torch.full((int(shares.sum()),), -1.0)
        for rank, part in enumerate(together):
            mine = np.concatenate(
                [np.arange(starts[lane], starts[lane] + shares[lane]) for lane in range(rank, lanes, size)] or [np.zeros(0)]
            )
            placed[torch.from_numpy(mine.astype(np.int64))] = part.x.flatten()
        assert torch.equal(placed, whole.x.flatten())
        assert np.array_equal(sum(part.cursors for part in together), whole.cursors)
        assert len(whole.x) == order.step_draws(step) * order.drawing.draw_tokens


@settings(deadline=None, max_examples=25)
@given(step=st.integers(1, 11), size=st.sampled_from([1, 2]), batching=st.sampled_from(["tokens", "images"]))
def test_a_run_goes_on_from_its_cursors(step: int, size: int, batching: str) -> None:
    order = order_of(lanes=4, batch=40 if batching == "tokens" else 8, epochs=1.6, batching=batching)
    step = min(step, order.steps - 1)
    undisturbed = batches(order)
    cursors = undisturbed[step - 1].cursors
    team = [mixer(order, rank, size, cursors, step) for rank in range(size)]
    for later in range(step, order.steps):
        found = sorted(value for one in team for value in drawn([one.step(later)]))
        assert found == sorted(drawn([undisturbed[later]]))


def test_the_seed_decides() -> None:
    first, again, other = (drawn(batches(replace(order_of(), seed=seed))) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_whole_images_stay_together_and_a_share_is_drawn_anew() -> None:
    order = order_of(lanes=4, batch=12, epochs=3, batching="images", share=0.6)
    tokens = np.array(drawn(batches(order))).reshape(-1, 3)
    assert (tokens // T == tokens[:, :1] // T).all()
    assert (np.diff(tokens % T, axis=1) > 0).all()
    of_one = {tuple(row % T) for row in tokens if row[0] // T == 17}
    assert len(of_one) > 1


def test_cls_tokens_are_told() -> None:
    batch = batches(order_of())[0]
    assert batch.is_cls is not None
    assert torch.equal(batch.is_cls, batch.x.flatten() % T == 0)


def test_unreadable_images_are_told_once_a_chunk_and_left_out() -> None:
    torn = frozenset({3, *range(80, 103)})
    parts = batches(order_of(epochs=1.2), unreadable=torn)
    assert not {value // T for value in drawn(parts)} & torn
    assert {position for part in parts for position, _, _ in part.bad} == torn
    assert len(drawn(parts)) == order_of(epochs=1.2).total


def test_no_readable_image_at_all_ends_the_run() -> None:
    with pytest.raises(UserError, match="no image of the data set can be read"):
        batches(order_of(), unreadable=frozenset(range(103)))


def test_nan_is_named_by_its_image() -> None:
    values = torch.zeros(3, T, 2)
    values[1, 4, 0] = float("nan")
    with pytest.raises(UserError, match="image 12 of the data set: NaN or infinite"):
        ChunkTokens(values, np.array([11, 12, 13])).check()


@settings(deadline=None, max_examples=50)
@given(lanes=st.integers(1, 9), batch=st.integers(1, 40), steps=st.integers(1, 30))
def test_the_step_of_a_draw(lanes: int, batch: int, steps: int) -> None:
    order = LaneOrder(ChunkTable(EDGES, 16), Drawing("tokens", T, 1.0, batch), lanes, 0, steps * batch)
    shares = np.array([order.shares(step) for step in range(steps)])
    for lane in range(lanes):
        taken = np.repeat(np.arange(steps), shares[:, lane])
        assert [order.step_of(lane, draw) for draw in range(len(taken))] == taken.tolist()
        assert [order.drawn(lane, step) for step in range(steps + 1)] == [0, *np.cumsum(shares[:, lane])]


def test_nothing_is_fetched_before_it_is_needed() -> None:
    for size, step in ((1, 0), (2, 0), (1, 7)):
        order = order_of(lanes=4, batch=50, epochs=40)
        cursors = batches(replace(order, total=50 * step))[-1].cursors if step else None
        for rank in range(size):
            found = mixer(order, rank, size, cursors, step)
            for later in range(step, order.steps):
                found.step(later)
            assert found.most_tokens <= 4 // size * 16 * T


@pytest.mark.parametrize("torn", [frozenset(), frozenset(range(0, 103, 9))])
def test_the_buffer_keeps_its_bound_over_many_epochs(torn: frozenset[int]) -> None:
    """Lanes drift apart where chunks are short or images unreadable; what is fetched follows."""
    for bound in (2 * 16 * T * 2, 2 * 16 * T * 5):
        order = order_of(epochs=60)
        lanes = num_lanes(bound, 16, len(order.table), order.drawing, order.total)
        assert 2 * lanes * 16 * T <= bound
        found = mixer(replace(order, lanes=lanes), unreadable=torn)
        for step in range(order.steps):
            found.step(step)
        assert lanes * 16 * T / 2 < found.most_tokens <= bound


@pytest.mark.parametrize(
    ("bound", "chunks", "batch", "total", "lanes"),
    [(10**9, 5000, 4096, 10**9, 4096), (10**9, 157, 4096, 10**9, 128), (10**9, 157, 40, 10**9, 32), (10**9, 157, 4096, 320, 4),
     (1, 157, 4096, 10**9, 1), (2 * 16 * T * 100, 5000, 4096, 10**9, 64)],
)  # fmt: skip
def test_lanes(bound: int, chunks: int, batch: int, total: int, lanes: int) -> None:
    assert num_lanes(bound, 16, chunks, Drawing("tokens", T, 1.0, batch), total) == lanes


def test_tokens_of_a_batch_come_from_many_images() -> None:
    mixed = order_of(lanes=8, batch=40, epochs=3)
    whole = replace(order_of(lanes=8, batch=8, epochs=3, batching="images"))
    assert distinct_images(mixed, 5).mean() > 30
    assert (distinct_images(whole, 5) == 8).all()


def test_expected_distinct_images() -> None:
    assert expected_distinct_images(10, 5, 1) == pytest.approx(1)
    assert expected_distinct_images(10, 5, 50) == 10
    random = np.random.default_rng(0)
    tried = [len(np.unique(random.permutation(500)[:60] // 5)) for _ in range(4000)]
    assert expected_distinct_images(100, 5, 60) == pytest.approx(np.mean(tried), rel=0.005)
