"""Sums over the workers of one training run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """What a training step needs of its fellow workers; every worker makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the workers, in its own precision."""

    def sum_gradients(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """Sums over the workers of gradients, each sent as soon as the iterable gives it."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def sum_gradients(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """The gradients themselves."""
        return list(gradients)


@dataclass(frozen=True)
class Distributed:
    """The default process group of torch.distributed, initialised by the caller, gloo or nccl."""

    compress: bool = False
    """Send and add gradients as bf16, at half the bytes; the rest stays exact."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def sum_gradients(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """In place; gradients are contiguous."""
        started: list[tuple[Tensor, Tensor, Any]] = []
        for gradient in gradients:
            sent = gradient.to(torch.bfloat16) if self.compress else gradient
            started.append((gradient, sent, dist.all_reduce(sent, async_op=True)))
        for gradient, sent, work in started:
            work.wait()
            if sent is not gradient:
                gradient.copy_(sent)
        return [gradient for gradient, _, _ in started]


def gathered(collective: Collective, values: np.ndarray, device: str) -> np.ndarray:
    """The values [m] int64 of all workers, each with an m of its own, end to end by rank.

    As a sum of float64, which holds whole numbers up to 2^53: every worker fills a place of its own.
    """
    lengths = torch.zeros(collective.size, dtype=torch.float64, device=device)
    lengths[collective.rank] = len(values)
    collective.sum_(lengths)
    ends = lengths.cpu().numpy().cumsum().astype(np.int64)
    held = torch.zeros(int(ends[-1]), dtype=torch.float64, device=device)
    held[int(ends[collective.rank]) - len(values) : int(ends[collective.rank])] = torch.from_numpy(values).to(device)
    collective.sum_(held)
    return held.cpu().numpy().astype(np.int64)
