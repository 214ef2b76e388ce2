"""What a check on a GPU found, beside the bound that it is held to."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """One number of a case; a case passes where every figure is within its bound."""

    name: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.found <= self.bound


def apart(name: str, found: Tensor, expected: Tensor, bound: float) -> Figure:
    """The norm of the difference over the norm of what is expected."""
    ours, plain = found.detach().cpu().to(torch.float64), expected.detach().cpu().to(torch.float64)
    if ours.shape != plain.shape:
        return Figure(f"{name}: shape {tuple(ours.shape)}, not {tuple(plain.shape)}", float("inf"), bound)
    return Figure(name, ((ours - plain).norm() / plain.norm().clamp_min(1e-30)).item(), bound)


def unequal(name: str, found: Tensor, expected: Tensor, bound: float = 0.0) -> Figure:
    """The share of elements that are not the same; NaN is the same as NaN."""
    ours, plain = found.detach().cpu(), expected.detach().cpu()
    if ours.shape != plain.shape:
        return Figure(f"{name}: shape {tuple(ours.shape)}, not {tuple(plain.shape)}", float("inf"), bound)
    same = (ours == plain) | ((ours != ours) & (plain != plain))
    return Figure(name, 1 - same.to(torch.float64).mean().item() if same.numel() else 0.0, bound)


def at_most(name: str, found: float, bound: float) -> Figure:
    return Figure(name, float(found), bound)


def has_gpu(device: str) -> bool:
    """Whether the device is a real GPU, not the CPU or a pretended one."""
    return device == "cuda" and torch.cuda.is_available()
