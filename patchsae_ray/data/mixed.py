"""How well the batches of an order are mixed: images and classes of a batch, beside those of a random draw."""

from dataclasses import dataclass

import numpy as np
import torch

from patchsae_ray.data.chunks import Demand, LaneOrder
from patchsae_ray.data.manifest import NO_LABEL
from patchsae_ray.data.mixing import WINDOW_STEPS, ChunkTokens, TokenMixer

_MOST_TERMS = 4096


@dataclass(frozen=True)
class Mixing:
    """Distinct images and classes among some tokens; classes are None where the images have no labels."""

    images: float
    classes: float | None

    @classmethod
    def of(cls, positions: np.ndarray, labels: np.ndarray | None) -> "Mixing":
        """Of the images at `positions`, each once."""
        return cls(float(len(positions)), None if labels is None else float(len(classes_of(positions, labels))))

    def as_metrics(self, suffix: str = "") -> dict[str, float]:
        """distinct_images and, with labels, distinct_classes, and the suffix."""
        classes = {} if self.classes is None else {f"distinct_classes{suffix}": self.classes}
        return {f"distinct_images{suffix}": self.images, **classes}


@dataclass(frozen=True)
class OrderMixing:
    """Of an order's first batches, mean over them, and of the first WINDOW_STEPS batches together."""

    batch: Mixing
    batch_at_random: Mixing
    """Expected of as many draws, tokens or whole images, at random from the whole data set."""
    window: Mixing
    window_at_random: Mixing
    window_steps: int
    """Batches of the window: WINDOW_STEPS, or the run's where it is shorter."""

    def as_metrics(self) -> dict[str, float]:
        """By name: distinct_images, distinct_classes, with _random, _window and _window_random; no classes without labels."""
        return {
            **self.batch.as_metrics(),
            **self.batch_at_random.as_metrics("_random"),
            **self.window.as_metrics("_window"),
            **self.window_at_random.as_metrics("_window_random"),
        }


def classes_of(positions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The classes of some images, ascending; those without a label have none.

    Args:
        positions: of the images.
        labels: of every image of the data set.
    """
    found = np.unique(labels[positions])
    return found[found != NO_LABEL]


def first_batches(order: LaneOrder, steps: int) -> list[np.ndarray]:
    """The images of each of an order's first batches, by position, were every image readable: the order alone, no tokens."""
    lanes = range(order.lanes)
    cursors = np.zeros((order.lanes, 2), dtype=np.int64)
    demand = Demand(order, lanes, cursors)
    t = order.drawing.tokens_per_image
    blank = ((one, ChunkTokens(torch.zeros(one.count, t, 0), one.positions)) for one in demand)
    mixer = TokenMixer(order, lanes, demand, blank, cursors, None)
    return [mixer.step(step).images for step in range(min(steps, order.steps))]


def order_mixing(order: LaneOrder, labels: np.ndarray | None) -> OrderMixing:
    """How well an order mixes.

    Args:
        order: of the run.
        labels: [num_images] int32, NO_LABEL without one; None where no image has a label.
    """
    batches = first_batches(order, WINDOW_STEPS)
    whole = batches[:-1] if len(batches) == order.steps > 1 else batches  # the last batch of a run may be smaller
    each = [Mixing.of(batch, labels) for batch in whole]
    draws = [min(count * order.drawing.batch_size, order.total) for count in (1, len(batches))]
    sizes = None if labels is None else np.bincount(labels[labels != NO_LABEL])
    at_random = [expected_mixing(order, sizes, count) for count in draws]
    return OrderMixing(
        batch=Mixing(
            float(np.mean([one.images for one in each])),
            None if labels is None else float(np.mean([one.classes or 0.0 for one in each])),
        ),
        batch_at_random=at_random[0],
        window=Mixing.of(np.unique(np.concatenate(batches)), labels),
        window_at_random=at_random[1],
        window_steps=len(batches),
    )


def expected_mixing(order: LaneOrder, class_sizes: np.ndarray | None, draws: int) -> Mixing:
    """Expected of an order's draws, tokens or whole images, at random from the whole data set, without replacement.

    Args:
        order: whose data set and share of tokens.
        class_sizes: [c] images of each class, None without labels.
        draws: how many; more than there are give everything.
    """
    each, images = order.drawing.image_draws, order.grain.num_images
    classes = None
    if class_sizes is not None:
        sizes, times = np.unique(class_sizes[class_sizes > 0], return_counts=True)
        classes = sum(
            count * chance_of_any(size * each, images * each, draws)
            for size, count in zip(sizes.tolist(), times.tolist(), strict=True)
        )
    return Mixing(images * chance_of_any(each, images * each, draws), classes)


def chance_of_any(marked: int, total: int, drawn: int) -> float:
    """Probability that `drawn` of `total` things, without replacement, have one of `marked` among them.

    1 - C(total - marked, drawn) / C(total, drawn), the hypergeometric distribution's at 0, as a product over the marked or
    the drawn ones, whichever are fewer; the logarithms of a long product are summed at _MOST_TERMS midpoints.
    """
    if drawn > total - marked:
        return 1.0
    few, many = sorted((marked, drawn))
    terms = min(few, _MOST_TERMS)
    midpoints = (np.arange(terms) + 0.5) * (few / terms) - 0.5
    return float(-np.expm1((few / terms) * np.log1p(-many / (total - midpoints)).sum()))
