"""The order of training tokens: every token once an epoch, the same for any number of workers, found again by its cursors."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae_ray.data.chunks import Chunk, Demand, Drawing, LaneOrder, num_lanes
from patchsae_ray.data.grains import Grain, RowGroups, SingleImages
from patchsae_ray.data.mixed import chance_of_any, classes_of, first_batches, order_mixing
from patchsae_ray.data.mixing import WINDOW_STEPS, ChunkTokens, TokenBatch, TokenMixer
from patchsae_ray.data.permutation import Permutation
from patchsae_ray.errors import UserError

T = 5
IMAGES = 103
EDGES = np.array([0, 40, 41, 80, 103])
GRAINS: dict[str, Grain] = {"image": SingleImages(IMAGES, 16), "group": RowGroups(EDGES)}


def order_of(lanes: int = 4, batch: int = 60, epochs: float = 1, grain: str = "image", **drawing: object) -> LaneOrder:
    drawn = replace(Drawing("tokens", T, 1.0, batch), **drawing)  # type: ignore[arg-type]
    total = round(epochs * IMAGES * drawn.kept_tokens / drawn.draw_tokens)
    return LaneOrder(GRAINS[grain], drawn, lanes, seed=3, total=total)


def named_tokens(asked: Iterator[Chunk], unreadable: frozenset[int] = frozenset()) -> Iterator[tuple[Chunk, ChunkTokens]]:
    """Tokens whose one value says which image and place they are of: position * T + place."""
    for one in asked:
        readable = np.array([position for position in one.positions if position not in unreadable], dtype=np.int64)
        values = torch.from_numpy(readable[:, None] * T + np.arange(T)).to(torch.float32)[:, :, None]
        bad = [(int(position), f"image {position}", "torn") for position in one.positions if position in unreadable]
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


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_permutation_has_each_number_once_and_the_seed_decides(n: int) -> None:
    found = Permutation(n, 1, 2)[np.arange(n)]
    assert sorted(found.tolist()) == list(range(n))
    assert np.array_equal(found, Permutation(n, 1, 2)[np.arange(n)])
    assert n < 16 or not np.array_equal(found, Permutation(n, 1, 3)[np.arange(n)])


def test_a_permutation_looks_random() -> None:
    n, bins = 60_000, 20
    found = np.stack([Permutation(n, seed)[np.arange(n)] for seed in range(4)])
    cells = np.stack([np.histogram2d(np.arange(n), one, bins)[0] for one in found])
    chi_square = ((cells - n / bins**2) ** 2 / (n / bins**2)).sum(axis=(1, 2))
    assert (abs(chi_square - (bins - 1) ** 2) < 5 * np.sqrt(2 * (bins - 1) ** 2)).all()
    steps = np.diff(found, axis=1)
    assert abs((steps > 0).mean() - 0.5) < 0.01
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.01
    assert (abs(steps) == 1).mean() < 10 / n  # neighbours of the data set are no neighbours in the order


def test_ten_thousand_million_images_take_no_memory() -> None:
    order = LaneOrder(SingleImages(10**10, 64), Drawing("tokens", 197, 1.0, 25_216), 256, 0, 10**9)
    found = np.concatenate([order.chunk(lane, ordinal).positions for lane in (0, 255) for ordinal in (0, 1, 10**6)])
    assert len(found) == 1 + 64 + 4 * 64
    assert len(np.unique(found)) == len(found)
    assert found.max() > 9 * 10**9


@pytest.mark.parametrize("lanes", [1, 3, 4])
@pytest.mark.parametrize("grain", ["image", "group"])
def test_the_chunks_of_an_epoch_hold_each_image_once(grain: str, lanes: int) -> None:
    order = order_of(lanes, grain=grain)
    ordinals = 2 + 200 // lanes
    found = [order.chunk(lane, ordinal) for ordinal in range(ordinals) for lane in range(lanes)]
    assert [chunk.count for chunk in found] == [order.count(chunk.lane, chunk.ordinal) for chunk in found]
    if grain == "group":  # the first groups come in two parts
        head = [position for chunk in found[: 2 * lanes] for position in chunk.positions]
        assert len(head) == len(set(head))
        rest = np.concatenate([chunk.positions for chunk in found[2 * lanes :]])
        epoch = rest[: IMAGES - len(head)]
        assert sorted([*head, *epoch]) == list(range(IMAGES))
    else:
        every = np.concatenate([chunk.positions for chunk in found])
        first, second = every[:IMAGES], every[IMAGES : 2 * IMAGES]
        assert sorted(first) == sorted(second) == list(range(IMAGES))
        assert first.tolist() != second.tolist()


@pytest.mark.parametrize("batching", ["tokens", "images"])
@pytest.mark.parametrize("grain", ["image", "group"])
def test_an_epoch_has_nearly_every_token_once(batching: str, grain: str) -> None:
    batch = 60 if batching == "tokens" else 12
    order = order_of(batch=batch, batching=batching, grain=grain)
    seen = drawn(batches(order))
    assert len(seen) == IMAGES * T
    assert len(set(range(IMAGES * T)) - set(seen)) < 0.4 * IMAGES * T  # the buffer keeps some, of the next epoch others
    many = np.bincount(drawn(batches(replace(order, total=20 * order.total))), minlength=IMAGES * T)
    assert many.min() >= 17
    assert many.max() <= 23


@settings(deadline=None, max_examples=25)
@given(
    size=st.sampled_from([1, 2, 3, 4]),
    lanes=st.sampled_from([4, 7]),
    batch=st.integers(7, 90),
    batching=st.sampled_from(["tokens", "images"]),
    share=st.sampled_from([1.0, 0.5]),
    grain=st.sampled_from(["image", "group"]),
)
def test_any_number_of_workers_draws_the_same_global_batches(
    size: int, lanes: int, batch: int, batching: str, share: float, grain: str
) -> None:
    lanes = min(lanes, GRAINS[grain].num_chunks)
    order = order_of(lanes, batch, 1.5, grain, batching=batching, share=share)
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
@given(
    step=st.integers(1, 11),
    size=st.sampled_from([1, 2]),
    batching=st.sampled_from(["tokens", "images"]),
    grain=st.sampled_from(["image", "group"]),
)
def test_a_run_goes_on_from_its_cursors(step: int, size: int, batching: str, grain: str) -> None:
    order = order_of(4, 40 if batching == "tokens" else 8, 1.6, grain, batching=batching)
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
    parts = batches(order_of(epochs=2.2), unreadable=torn)
    assert not {value // T for value in drawn(parts)} & torn
    assert {position for part in parts for position, _, _ in part.bad} == torn
    assert len(drawn(parts)) == order_of(epochs=2.2).total


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
    order = LaneOrder(GRAINS["image"], Drawing("tokens", T, 1.0, batch), lanes, 0, steps * batch)
    shares = np.array([order.shares(step) for step in range(steps)])
    for lane in range(lanes):
        taken = np.repeat(np.arange(steps), shares[:, lane])
        assert [order.step_of(lane, draw) for draw in range(len(taken))] == taken.tolist()
        assert [order.drawn(lane, step) for step in range(steps + 1)] == [0, *np.cumsum(shares[:, lane])]


@pytest.mark.parametrize("grain", ["image", "group"])
def test_nothing_is_fetched_before_it_is_needed(grain: str) -> None:
    for size, step in ((1, 0), (2, 0), (1, 7)):
        order = order_of(lanes=4, batch=50, epochs=40, grain=grain)
        cursors = batches(replace(order, total=50 * step))[-1].cursors if step else None
        for rank in range(size):
            found = mixer(order, rank, size, cursors, step)
            for later in range(step, order.steps):
                found.step(later)
            assert found.most_tokens <= 4 // size * order.grain.chunk_images * T


@pytest.mark.parametrize("torn", [frozenset(), frozenset(range(0, 103, 9))])
def test_the_buffer_keeps_its_bound_over_many_epochs(torn: frozenset[int]) -> None:
    """Lanes drift apart where chunks are short or images unreadable; what is fetched follows."""
    for bound in (2 * 16 * T * 2, 2 * 16 * T * 5):
        order = order_of(epochs=60)
        lanes = num_lanes(bound, order.grain, order.drawing, order.total)
        found = mixer(replace(order, lanes=lanes), unreadable=torn)
        for step in range(order.steps):
            found.step(step)
        assert 0.5 * lanes * 16 * T < found.most_tokens <= bound


@pytest.mark.parametrize(
    ("bound", "chunks", "batch", "total", "lanes"),
    [(10**9, 5000, 4096, 10**9, 4096), (10**9, 157, 4096, 10**9, 128), (10**9, 157, 40, 10**9, 32), (10**9, 157, 4096, 320, 4),
     (1, 157, 4096, 10**9, 1), (16 * T * 70, 5000, 4096, 10**9, 64)],
)  # fmt: skip
def test_lanes(bound: int, chunks: int, batch: int, total: int, lanes: int) -> None:
    assert num_lanes(bound, SingleImages(16 * chunks, 16), Drawing("tokens", T, 1.0, batch), total) == lanes


def sorted_by_class(
    images: int = 12_800, classes: int = 100, batch: int = 2_000, lanes: int = 64
) -> tuple[LaneOrder, np.ndarray]:
    labels = (np.arange(images) * classes // images).astype(np.int32)
    return LaneOrder(SingleImages(images, 16), Drawing("tokens", 20, 1.0, batch), lanes, 0, 100 * batch), labels


def test_batches_of_a_data_set_sorted_by_class_have_the_classes_of_a_random_draw() -> None:
    order, labels = sorted_by_class()
    found = order_mixing(order, labels)
    assert found.batch.classes == pytest.approx(found.batch_at_random.classes, rel=0.03)
    assert found.batch.images > 500
    assert found.window.classes == found.window_at_random.classes == 100
    assert found.as_metrics().keys() >= {"distinct_images", "distinct_classes_window_random"}
    unlabelled = order_mixing(order, None)
    assert unlabelled.batch.classes is unlabelled.window_at_random.classes is None
    assert unlabelled.batch.images == found.batch.images


def test_a_window_has_the_images_of_its_batches() -> None:
    order, labels = sorted_by_class(batch=40, lanes=8)
    alone = mixer_of_blanks(order)
    parts = [alone.step(step) for step in range(2 * WINDOW_STEPS)]
    windows = [step for step, part in enumerate(parts) if part.window_images is not None]
    assert windows == [WINDOW_STEPS - 1, 2 * WINDOW_STEPS - 1]
    last = parts[-1].window_images
    assert last is not None
    assert set(last) == {int(image) for part in parts[WINDOW_STEPS:] for image in part.images}
    assert set(classes_of(last, labels)) == {int(labels[image]) for image in last}


def mixer_of_blanks(order: LaneOrder) -> TokenMixer:
    cursors = np.zeros((order.lanes, 2), np.int64)
    demand = Demand(order, range(order.lanes), cursors)
    t = order.drawing.tokens_per_image
    blank = ((one, ChunkTokens(torch.zeros(one.count, t, 0), one.positions)) for one in demand)
    return TokenMixer(order, range(order.lanes), demand, blank, cursors, None)


@pytest.mark.parametrize("batching", ["tokens", "images"])
def test_fetching_is_steady_once_the_lanes_are_filled(batching: str) -> None:
    order, _ = sorted_by_class()
    if batching == "images":
        order = replace(order, drawing=replace(order.drawing, batching="images", batch_size=100), total=10_000)
    alone, filled = mixer_of_blanks(order), [0]
    for step in range(100):
        alone.step(step)
        filled.append(alone.chunks_filled)
    fetched = np.diff(filled)
    assert fetched[0] >= order.lanes  # the start needs all of them
    assert fetched[1:].max() <= 4 * max(0.5, fetched[1:].mean())


def test_lanes_hold_what_the_buffer_allows() -> None:
    drawing, grain = Drawing("tokens", 20, 1.0, 2_000), SingleImages(12_800, 16)
    bound = 10_000
    order = LaneOrder(grain, drawing, num_lanes(bound, grain, drawing, 10**6), 0, 200 * 2_000)
    alone = mixer_of_blanks(order)
    for step in range(order.steps):
        alone.step(step)
    assert order.lanes == 32
    assert 0.5 * bound < alone.most_tokens <= bound


def test_whole_images_are_as_many_as_a_batch_takes() -> None:
    order = order_of(lanes=8, batch=8, epochs=3, batching="images")
    assert {len(images) for images in first_batches(order, 5)} == {8}
    assert order_mixing(order, None).batch_at_random.images == pytest.approx(8)  # of whole images too


def test_chances_of_a_random_draw() -> None:
    assert chance_of_any(5, 50, 1) == pytest.approx(0.1)
    assert chance_of_any(5, 50, 50) == 1
    random = np.random.default_rng(0)
    tried = [len(np.unique(random.permutation(500)[:60] // 5)) for _ in range(4000)]
    assert 100 * chance_of_any(5, 500, 60) == pytest.approx(np.mean(tried), rel=0.005)
    exact = 1 - np.prod(1 - 9_000 / (10**6 - np.arange(8_000.0)))
    assert chance_of_any(8_000, 10**6, 9_000) == pytest.approx(exact, rel=1e-9)
    assert chance_of_any(197, 197 * 10**9, 25_216) == pytest.approx(25_216 / 10**9, rel=1e-3)
