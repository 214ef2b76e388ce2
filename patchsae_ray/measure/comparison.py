"""Two models' class counts side by side: which latents stay, fall and rise (PatchSAE, section 4). No Ray.

The rule, for one class with counts b of the base model and a of the adapted one: a latent is *high* in a model where its
count is at least the smaller of the two models' `high_k`-th largest counts, and *low* where it is below the smaller of the two
models' `low_k`-th largest; a count of 0 is always low and never high. Looked at are the latents among the `high_k` largest of
either model:

- high in both: high in b and in a;
- high to low: among b's largest, and low in a;
- low to high: among a's largest, and low in b;
- between: the rest.

Shapes: s latents, c classes. Equal counts: the lower latent first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

GROUPS = ("high in both", "high to low", "low to high", "between")


def column_of(group: str) -> str:
    """A group's name as a column of a table."""
    return group.replace(" ", "_")


@dataclass(frozen=True)
class CountsChange:
    """What became of the counts of one class, or of all."""

    latents: np.ndarray
    """[u] among the largest of either model, by number."""
    groups: np.ndarray
    """[u] index into GROUPS."""
    ranks: np.ndarray
    """[2, u] place in the base's and in the adapted's order, 0 first."""
    rank_correlation: float
    """Spearman's, over the latents that are active in either; NaN where there are fewer than two."""
    shared: dict[int, float]
    """k → share of the base's k largest, as far as they are active, that are among the adapted's; NaN where none is."""

    def number(self, group: str) -> int:
        """How many latents are in a group."""
        return int((self.groups == GROUPS.index(group)).sum())


def compare_counts(
    base: np.ndarray, adapted: np.ndarray, high_k: int = 50, low_k: int = 100, ks: Sequence[int] = (10, 50, 100)
) -> CountsChange:
    """Compare two models' counts [s] by the rule of this module.

    Args:
        base: of the base model.
        adapted: of the adapted one.
        high_k: how many of the largest counts make a latent high; s where there are fewer.
        low_k: below how many it is low.
        ks: for `shared`.
    """
    counts = np.stack([base, adapted]).astype(np.float64)
    order = np.argsort(-counts, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    ordered = np.take_along_axis(counts, order, axis=1)
    high = max(1.0, float(ordered[:, min(high_k, len(base)) - 1].min()))
    low = max(1.0, float(ordered[:, min(low_k, len(base)) - 1].min()))
    largest = (ranks < high_k) & (counts > 0)
    latents = np.flatnonzero(largest.any(axis=0))
    (b, a), (of_base, of_adapted) = counts[:, latents], largest[:, latents]
    conditions = [(b >= high) & (a >= high), of_base & (a < low), of_adapted & (b < low)]
    groups = np.select(conditions, [0, 1, 2], default=3)
    of_both = {k: ((ranks < k) & (counts > 0)) for k in ks if k <= len(base)}
    shared = {k: _share(both.all(axis=0).sum(), both[0].sum()) for k, both in of_both.items()}
    return CountsChange(latents, groups, ranks[:, latents], spearman(counts[0], counts[1]), shared)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two rows, over the places where either is above 0; equal values share their mean rank."""
    active = (a > 0) | (b > 0)
    if active.sum() < 2:
        return float("nan")
    first, second = (pd.Series(row[active]).rank().to_numpy() for row in (a, b))
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
