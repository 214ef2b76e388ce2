"""Pixels → residuals at the hook, a batch at a time: what every pass begins with."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.measure.compiling import Compiled
from patchsae_ray.measure.stages import StageTimer


class ResidualBatches:
    """The tower up to the hook, over a unit's pixels; with or without gradients, as the caller has it.

    On a GPU the tower is compiled where that is possible, and the next batch's pixels are copied while this one's are worked
    on; the last batch of a unit is filled up with blank images so that there is one shape to compile for.

    Args:
        backbone: the frozen tower.
        batch_size: images a forward pass.
        device: cpu or cuda, where the backbone is.
    """

    def __init__(self, backbone: Backbone, batch_size: int, device: str) -> None:
        self._batch_size, self._device = batch_size, device
        self._to_hook: Callable[[Tensor], Tensor] = backbone.to_hook
        if device == "cuda":
            self._to_hook = Compiled(backbone.to_hook, "the vision tower")

    def of(self, pixels: np.ndarray, timer: StageTimer) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the unit, and their residuals [n, t, d].

        Args:
            pixels: [images, h, w, 3] uint8.
            timer: charged with `copy` and `to_hook`.
        """
        for rows, batch in self._batches(pixels):
            timer.mark("copy")
            x = self._to_hook(batch)[: rows.stop - rows.start]
            timer.mark("to_hook")
            yield rows, x

    def _batches(self, pixels: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        starts = range(0, len(pixels), self._batch_size)
        rows = [slice(start, min(start + self._batch_size, len(pixels))) for start in starts]
        if self._device != "cuda":
            for part in rows:
                yield part, torch.from_numpy(np.array(pixels[part]))
            return
        stream = torch.cuda.Stream()
        ahead = self._start_copy(pixels, rows[0], stream) if rows else None
        for index, part in enumerate(rows):
            torch.cuda.current_stream().wait_stream(stream)
            batch = ahead
            assert batch is not None
            batch.record_stream(torch.cuda.current_stream())
            ahead = self._start_copy(pixels, rows[index + 1], stream) if index + 1 < len(rows) else None
            yield part, batch

    def _start_copy(self, pixels: np.ndarray, rows: slice, stream: "torch.cuda.Stream") -> Tensor:
        """Begin to copy a batch to the GPU through pinned memory, filled up to the batch size."""
        held = torch.zeros(self._batch_size, *pixels.shape[1:], dtype=torch.uint8).pin_memory()
        held[: rows.stop - rows.start] = torch.from_numpy(np.array(pixels[rows]))
        with torch.cuda.stream(stream):
            return held.to("cuda", non_blocking=True)
