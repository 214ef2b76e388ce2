"""Which model of device computed: results of two models agree to rounding and no further, so it is on record."""

import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)


def device_name(device: str) -> str:
    """The model of what this process computes on: the GPU's name, or the CPU's with the instructions that torch takes.

    Args:
        device: cpu or cuda.
    """
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{_cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def warn_of_several(what: str, devices: Sequence[str]) -> None:
    """Say it where a result was computed on more than one model of device, by this run or by those that it goes on from."""
    if len(devices) > 1:
        log.warning(
            "%s: computed on several kinds of device (%s); another run may differ where rounding decides: last digits, "
            "and a count or a place in a top list here and there",
            what, "; ".join(devices),
        )  # fmt: skip
