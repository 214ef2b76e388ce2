"""Orders of the latents: which are kept, or removed, first.

Shapes: n images, s latents, c classes. Equal values: the lower latent first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.errors import UserError, nearest

RANKINGS = {
    "class": "counts of the image's class",
    "dataset": "counts over all classes",
    "random": "random orders, shared by all images",
    "image": "the image's own mean activations",
    "predicted": "counts of the class that CLIP predicts without the SAE",
    "cross": "another model's counts of the image's class",
}
_BY_COUNTS = ("class", "dataset", "predicted")
MAX_ORDERS = 100
CACHE_BYTES = 2**30
"""Of the orders kept by class: all 1,000 classes of 49,152 latents take 98 MB, and 10,922 fit. Others are made anew."""


@dataclass(frozen=True)
class Ranking:
    """One of RANKINGS."""

    name: str
    orders: int = 1
    """How many orders it has; only random ones may be several."""

    @property
    def needs_counts(self) -> bool:
        """Whether it is made from class counts."""
        return self.name in _BY_COUNTS


def parse_rankings(text: str) -> list[Ranking]:
    """`class,random:5` → the rankings, in order.

    Raises: UserError for an unknown one, one named twice, or a number where there is none to give.
    """
    rankings: list[Ranking] = []
    for part in (piece.strip() for piece in text.split(",")):
        name, colon, orders = part.partition(":")
        if name not in RANKINGS:
            raise UserError(f"--rank_by {part!r}: {', '.join(RANKINGS)} are known{nearest(name, list(RANKINGS))}")
        if colon and (name != "random" or not orders.isdecimal() or len(orders) > 9 or not 1 <= int(orders) <= MAX_ORDERS):
            right = f"random:N with N from 1 to {MAX_ORDERS}" if name == "random" else name
            raise UserError(f"--rank_by {part[:40]!r}: {right} would be right")
        if name in {ranking.name for ranking in rankings}:
            raise UserError(f"--rank_by {text!r}: {name} is there twice; once would be right")
        rankings.append(Ranking(name, int(orders) if colon else 1))
    return rankings


class Ranker:
    """Places of the latents in an image's order.

    Args:
        counts: class counts [s, c], or None where no ranking needs them.
        cross: another model's, for the ranking `cross`.
        num_latents: s.
        seed: of the first random order; the next takes the next seed.
        device: where the places are wanted.
    """

    def __init__(
        self, counts: np.ndarray | None, num_latents: int, seed: int, device: str, cross: np.ndarray | None = None
    ) -> None:
        self._counts, self._cross, self._num_latents, self._seed, self._device = counts, cross, num_latents, seed, device
        self._compact = torch.int16 if num_latents <= 2**16 else torch.int32
        row_bytes = num_latents * self._compact.itemsize
        self._of_class = lru_cache(maxsize=max(16, CACHE_BYTES // row_bytes))(self._make_of_class)
        self._of_dataset = lru_cache(maxsize=1)(self._make_of_dataset)
        self._random = lru_cache(maxsize=MAX_ORDERS)(self._make_random)

    def ranks(
        self, ranking: Ranking, labels: Sequence[int], predicted: Sequence[int], means: Callable[[], Tensor]
    ) -> list[Tensor]:
        """For each of the ranking's orders the place of each latent, 0 first: [n, s] int64.

        Args:
            ranking: which.
            labels: [n] true classes.
            predicted: [n] classes predicted without the autoencoder.
            means: gives the images' mean activations [n, s].
        """
        n = len(labels)
        if ranking.name == "random":
            return [self._random(order).expand(n, -1) for order in range(ranking.orders)]
        if ranking.name == "dataset":
            return [self._of_dataset().expand(n, -1)]
        if ranking.name == "image":
            return [_places(torch.argsort(means(), dim=1, descending=True, stable=True))]
        classes = predicted if ranking.name == "predicted" else labels
        rows = torch.stack([self._of_class(label, ranking.name == "cross") for label in classes]).to(torch.int64)
        return [rows & 0xFFFF if self._compact == torch.int16 else rows]

    def _make_of_class(self, label: int, cross: bool) -> Tensor:
        """[s] in two bytes where they do: places from 2^15 on wrap to negative ones, whose low 16 bits are the place."""
        return self._by(_known(self._cross if cross else self._counts)[:, label]).to(self._compact)

    def _make_of_dataset(self) -> Tensor:
        return self._by(_known(self._counts).sum(axis=1))

    def _make_random(self, order: int) -> Tensor:
        permutation = np.random.default_rng(self._seed + order).permutation(self._num_latents)
        return _places(torch.from_numpy(permutation)[None].to(self._device))[0]

    def _by(self, counts: np.ndarray) -> Tensor:
        order = np.argsort(-counts.astype(np.float64), kind="stable")
        return _places(torch.from_numpy(order)[None].to(self._device))[0]


def _known(counts: np.ndarray | None) -> np.ndarray:
    if counts is None:
        raise ValueError("this ranking needs class counts")
    return counts


def _places(order: Tensor) -> Tensor:
    """Latents in order [n, s] → place of each latent [n, s]."""
    places = torch.empty_like(order)
    return places.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
