"""How well batches are mixed and how steadily they are fetched, of a data set sorted by class, and what is read for them.

    python tests/benchmarks/order.py --images 1281167 --classes 1000 --workers 1,4 [--layout files|tar|cache|parquet]

The order of a whole data set is gone through without its images: the lanes of each number of workers are filled with tokens
of no width, as many steps as asked for, by the code that training uses. A random draw is what as many tokens drawn from the
whole data set would give, by formula. Fetches are counted in chunks (64 images, or a row group of 1,000 rows) a step, without
the first step, which fills the lanes and is given apart. What is read is measured on a data set of the layout with fewer and
smaller images (written to a temporary folder: archives and row groups of 1,000), on the chunks of its own first steps, by a
file system that counts bytes; used are the bytes of the images themselves, or of the cached activations. Parquet here is of
the kind whose row groups do not fit in memory. The last line is one JSON object. Needs torch and this package; no Ray.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from patchsae_ray.data.chunks import Chunk, Demand, Drawing, LaneOrder, num_lanes
from patchsae_ray.data.grains import Grain, RowGroups, SingleImages
from patchsae_ray.data.mixed import classes_of, expected_mixing
from patchsae_ray.data.mixing import WINDOW_STEPS, ChunkTokens, TokenMixer
from tests.benchmarks.order_reads import bytes_read_share

TOKENS, BATCH_IMAGES, CHUNK_IMAGES, BUFFER_TOKENS, GROUP_ROWS = 197, 128, 64, 2**21, 1000


@dataclass
class Simulated:
    """What some steps of an order were made of."""

    images: list[np.ndarray]
    """By step: the images, over all workers."""
    fetched: list[int]
    """By step: chunks, over all workers."""


def grain_of(layout: str, images: int) -> Grain:
    """What training reads at a time of a data set in this layout."""
    if layout == "parquet":
        return RowGroups(np.unique([*range(0, images, GROUP_ROWS), images]))
    return SingleImages(images, CHUNK_IMAGES)


def order_of(grain: Grain, steps: int) -> LaneOrder:
    """The order of ViT-B/16's defaults."""
    drawing = Drawing("tokens", TOKENS, 1.0, BATCH_IMAGES * TOKENS)
    total = max(steps, 10_000) * drawing.batch_size
    return LaneOrder(grain, drawing, num_lanes(BUFFER_TOKENS, grain, drawing, total), 42, total)


def blank(demand: Iterator[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
    """Chunks whose tokens have no width."""
    for one in demand:
        yield one, ChunkTokens(torch.zeros(one.count, TOKENS, 0), one.positions)


def simulate(order: LaneOrder, steps: int, workers: int) -> Simulated:
    """The first steps of an order by a number of workers."""
    cursors = np.zeros((order.lanes, 2), np.int64)
    team = []
    for rank in range(workers):
        lanes = range(rank, order.lanes, workers)
        demand = Demand(order, lanes, cursors)
        team.append(TokenMixer(order, lanes, demand, blank(demand), cursors, None))
    found, before = Simulated([], []), 0
    for step in range(steps):
        found.images.append(np.unique(np.concatenate([one.step(step).images for one in team])))
        filled = sum(one.chunks_filled for one in team)
        found.fetched.append(filled - before)
        before = filled
    return found


def report(order: LaneOrder, found: Simulated, labels: np.ndarray) -> dict[str, float]:
    """The figures of one number of workers."""
    sizes, batch = np.bincount(labels), order.drawing.batch_size
    at_random, window_at_random = (expected_mixing(order, sizes, count * batch) for count in (1, WINDOW_STEPS))
    starts = range(0, len(found.images) - WINDOW_STEPS + 1, WINDOW_STEPS)
    whole = [np.unique(np.concatenate(found.images[start : start + WINDOW_STEPS])) for start in starts]
    classes = [len(classes_of(images, labels)) for images in found.images]
    later = found.fetched[1:]
    return {
        "classes_in_batch": float(np.mean(classes)),
        "classes_in_first_batch": classes[0],
        "classes_in_batch_random": at_random.classes or 0.0,
        "classes_in_64_batches": float(np.mean([len(classes_of(images, labels)) for images in whole])),
        "classes_in_64_batches_random": window_at_random.classes or 0.0,
        "images_in_batch": float(np.mean([len(images) for images in found.images])),
        "images_in_batch_random": at_random.images,
        "images_in_64_batches": float(np.mean([len(images) for images in whole])),
        "images_in_64_batches_random": window_at_random.images,
        "first_fetch": found.fetched[0],
        "largest_fetch": max(later),
        "mean_fetch": float(np.mean(later)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--workers", default="1,4")
    parser.add_argument("--layout", choices=["files", "tar", "cache", "parquet"], default="files")
    parser.add_argument("--steps", type=int, default=2 * WINDOW_STEPS)
    given = parser.parse_args()
    labels = np.arange(given.images) * given.classes // given.images
    order = order_of(grain_of(given.layout, given.images), given.steps)
    print(f"{given.layout}: {given.images:,} images sorted by class, {order.lanes} lanes, {given.steps} steps")
    by_workers, first = {}, None
    for workers in (int(part) for part in given.workers.split(",")):
        found = simulate(order, given.steps, workers)
        first = first or found
        if any(not np.array_equal(one, other) for one, other in zip(first.images, found.images, strict=True)):
            raise SystemExit(f"{workers} workers draw other batches")
        by_workers[workers] = report(order, found, labels)
        print(f"  {workers} workers: " + ", ".join(f"{name} {value:,.1f}" for name, value in by_workers[workers].items()))
    read = bytes_read_share(given.layout)
    print(f"  bytes read over bytes used, on {read['images']:,} images: {read['share']:.4f}")
    figures = next(iter(by_workers.values()))
    print(json.dumps({"layout": given.layout, **figures, "workers_draw_alike": True, "bytes_read_share": read["share"]}))


if __name__ == "__main__":
    main()
