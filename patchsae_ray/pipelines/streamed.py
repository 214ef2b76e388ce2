"""Tokens by Ray Data: chunks are decoded on CPUs, run through CLIP by actors, and reach a training worker in order."""

import json
import logging
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray
import torch

from patchsae_ray.data.activations import DTYPES
from patchsae_ray.data.chunks import Chunk, LaneOrder
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.mixing import ChunkTokens
from patchsae_ray.errors import UserError
from patchsae_ray.names import ActivationDtype, Tokens
from patchsae_ray.pipelines.arrivals import Arrivals
from patchsae_ray.pipelines.chunk_rows import DecodeChunk, row_of
from patchsae_ray.pipelines.decoding import Attempt, fresh_context
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.pipelines.token_sources import AHEAD_CHUNKS, ChunkTower
from patchsae_ray.pipelines.train_plan import TrainPlan

log = logging.getLogger(__name__)

WAVE_CHUNKS = 20_000
"""Chunks that Ray Data is told of at once, so that what it keeps of each stays small."""
LEAST_STORE_BYTES = 128 * 2**20
"""Of the object store that a stream may use, however small the buffer."""


@dataclass(frozen=True)
class TowerTask:
    """What the actors run."""

    model: PortableModel
    tokens: Tokens
    dtype: ActivationDtype
    chunk_images: int

    def start(self, device: str) -> ChunkTower:
        """Load CLIP on the actor's device."""
        backbone = self.model.build_backbone(device)
        return ChunkTower(backbone, backbone.token_slice(self.tokens), self.dtype, self.chunk_images, device)


class _Tower:
    """One chunk in, its tokens out; runs in a process of its own."""

    def __init__(self, task: "ray.ObjectRef[TowerTask]", plan: TrainPlan, board: Any, stream: str) -> None:
        torch.set_num_threads(plan.threads)
        self._tower, self._board, self._stream = ray.get(task).start(plan.device), board, stream

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        lane, ordinal = int(rows["lane"][0]), int(rows["ordinal"][0])
        with Attempt(self._board, "model", (self._stream, lane, ordinal), f"chunk {ordinal} of lane {lane}") as failed:
            if failed:
                raise UserError(failed)
            values = self._tower.tokens(rows["pixels"][0])
        kept = {name: rows[name] for name in ("lane", "ordinal", "positions", "header")}
        data = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {**kept, "shape": np.array([values.shape]), "values": [data]}


@dataclass(frozen=True)
class Streamed:
    """A worker's own stream.

    Args:
        manifest: the images.
        image_size: side of the pixels.
        task: what the actors run.
        order: of the run, for how much of it will be needed.
        plan: of the whole job.
        board: told what is tried.
        lanes: of this worker; a sixteenth of what they hold may be on its way, for the buffer's bound.
        width: d.
    """

    manifest: Manifest
    image_size: int
    task: TowerTask
    order: LaneOrder
    plan: TrainPlan
    board: Any
    lanes: int
    width: int

    def chunks(self, wanted: Iterator[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        task, stream = ray.put(self.task), secrets.token_hex(4)
        for wave in self._waves(wanted):
            with Arrivals(self._dataset(wave, task, stream), min(AHEAD_CHUNKS, self.lanes)) as arrivals:
                for one in wave:
                    yield one, self._content(one, arrivals)

    def _waves(self, wanted: Iterator[Chunk]) -> Iterator[list[Chunk]]:
        """What the run will need, in waves; then, for images that could not be read, a few more at a time."""
        order = self.order
        a_chunk = order.grain.num_images / order.grain.num_chunks * order.drawing.image_draws
        last = math.ceil(order.total / (order.lanes * a_chunk)) + 1  # the first chunk of a lane is a part of one
        ended: Chunk | None = None
        while True:
            wave = [] if ended is None else [ended]
            ended = None
            for one in islice(wanted, WAVE_CHUNKS - len(wave)):
                if one.ordinal > last and wave:
                    ended, last = one, one.ordinal
                    break
                wave.append(one)
            yield wave

    def _dataset(self, wave: Sequence[Chunk], task: Any, stream: str) -> Any:
        with fresh_context() as context:
            context.execution_options = self._options()
            rows = ray.data.from_items([row_of(one) for one in wave], override_num_blocks=len(wave))
            decode = DecodeChunk(self.manifest, self.image_size, self.board, stream)
            pools = max(1, self.plan.num_workers)  # each training worker has one of its own
            low = min(len(wave), max(1, self.plan.min_actors // pools))
            high = min(len(wave), max(low, math.ceil(self.plan.max_actors / pools)))
            return rows.map(decode.__call__, num_cpus=self.plan.decode_cpus).map_batches(
                _Tower,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, initial_size=low),
                num_cpus=self.plan.actor_cpus,
                num_gpus=self.plan.actor_gpus or None,
                fn_constructor_args=(task, self.plan, self.board, stream),
            )

    def _options(self) -> Any:
        """Blocks in order, and no more of them than the buffer's bound."""
        image_bytes = self.order.drawing.tokens_per_image * self.width * DTYPES[self.task.dtype].itemsize
        store = max(LEAST_STORE_BYTES, self.lanes * self.order.grain.chunk_images * image_bytes // 16)  # beside the lanes
        return ray.data.ExecutionOptions(
            preserve_order=True, resource_limits=ray.data.ExecutionResources(object_store_memory=store)
        )

    def _content(self, one: Chunk, arrivals: Arrivals) -> ChunkTokens:
        reference = None
        while reference is None:
            reference = arrivals.next(timeout=1.0)
        row = ray.get(reference).to_pylist()[0]
        if (row["lane"], row["ordinal"]) != (one.lane, one.ordinal):
            raise RuntimeError(f"chunk {one.ordinal} of lane {one.lane} expected, {row['ordinal']} of {row['lane']} came")
        values = torch.frombuffer(bytearray(row["values"]), dtype=DTYPES[self.task.dtype]) if row["values"] else torch.empty(0)
        bad = [(int(position), str(path), str(why)) for position, path, why in json.loads(row["header"])["bad"]]
        return ChunkTokens(values.view(tuple(row["shape"])), np.array(row["positions"], dtype=np.int64), bad)
