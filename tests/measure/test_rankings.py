"""Orders of the latents, and how they are named."""

import numpy as np
import pytest
import torch

from patchsae_ray.errors import UserError
from patchsae_ray.measure.rankings import Ranker, Ranking, parse_rankings

COUNTS = np.array([[5, 0], [5, 9], [7, 0], [0, 1]])


def no_means() -> torch.Tensor:
    raise AssertionError("not wanted")


def order(ranker: Ranker, name: str, labels: list[int], predicted: list[int]) -> list[list[int]]:
    (ranks,) = ranker.ranks(Ranking(name), labels, predicted, no_means)
    return torch.argsort(ranks, dim=1).tolist()


def test_by_counts_equal_ones_by_number() -> None:
    ranker = Ranker(COUNTS, 4, 0, "cpu")
    assert order(ranker, "class", [0, 1], [1, 1]) == [[2, 0, 1, 3], [1, 3, 0, 2]]
    assert order(ranker, "predicted", [0, 1], [1, 1]) == [[1, 3, 0, 2], [1, 3, 0, 2]]
    assert order(ranker, "dataset", [0, 1], [1, 1]) == [[1, 2, 0, 3]] * 2


def test_by_the_images_own_means() -> None:
    means = torch.tensor([[0.0, 2.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    (ranks,) = Ranker(None, 4, 0, "cpu").ranks(Ranking("image"), [0, 0], [0, 0], lambda: means)
    assert torch.argsort(ranks, dim=1).tolist() == [[3, 1, 2, 0], [0, 1, 2, 3]]


def test_random_orders_are_shared_and_one_a_seed() -> None:
    first = Ranker(None, 100, 7, "cpu").ranks(Ranking("random", 3), [0, 0], [0, 0], no_means)
    assert len(first) == 3
    for ranks in first:
        assert torch.equal(ranks[0], ranks[1])
        assert torch.equal(ranks[0].sort().values, torch.arange(100))
    assert len({tuple(ranks[0].tolist()) for ranks in first}) == 3
    later = Ranker(None, 100, 8, "cpu").ranks(Ranking("random", 2), [0], [0], no_means)
    assert [ranks[0].tolist() for ranks in later] == [ranks[0].tolist() for ranks in first[1:]]


def test_names() -> None:
    assert parse_rankings("class, random:5,image") == [Ranking("class"), Ranking("random", 5), Ranking("image")]
    assert parse_rankings("random") == [Ranking("random")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clas", "did you mean 'class'"), ("", "class, dataset, random, image, predicted, cross are known"),
        ("class:2", "class would be right"), ("random:0", "random:N with N from 1 to 100"), ("random:x", "random:N"),
        ("random:", "random:N"), ("random:101", "to 100"), ("class,random,class", "class is there twice"),
    ],
)  # fmt: skip
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_rankings(text)


@pytest.mark.parametrize("num_latents", [3, 2**16, 2**16 + 1])
def test_kept_orders_are_compact_and_lose_nothing(monkeypatch: pytest.MonkeyPatch, num_latents: int) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (num_latents, 4))
    ranker = Ranker(counts, num_latents, 0, "cpu", counts[:, ::-1])
    made = []
    sort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *given, **more: made.append(1) or sort(*given, **more))
    labels = [3, 0, 3, 1]
    for name, wanted in (("class", counts), ("cross", counts[:, ::-1]), ("class", counts)):
        (ranks,) = ranker.ranks(Ranking(name), labels, labels, no_means)
        assert ranks.dtype == torch.int64
        for row, label in zip(ranks.numpy(), labels, strict=True):
            order = sort(-wanted[:, label].astype(np.float64), kind="stable")
            assert np.array_equal(row[order], np.arange(num_latents))
    assert len(made) == 6, "each class is put in order once"


def test_a_thousand_classes_of_the_released_width_are_all_kept() -> None:
    ranker = Ranker(np.zeros((49_152, 1), dtype=np.int64), 49_152, 0, "cpu")
    assert ranker._of_class.cache_info().maxsize >= 10 * 1000
    (ranks,) = ranker.ranks(Ranking("class"), [0], [0], no_means)
    assert ranker._of_class(0, False).nbytes * 1000 < 100e6
    assert torch.equal(ranks[0], torch.arange(49_152))
