"""Seconds by stage, and peak memory of a process."""

import resource
import sys
import time

import torch


class StageTimer:
    """Seconds by stage; on a GPU each mark waits for the device, so that a stage is charged what it used."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        """Charge the time since the last mark to `stage`."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes (getrusage counts kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
