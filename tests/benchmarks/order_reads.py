"""What reading the chunks of an order costs: bytes read over bytes used, counted by a file system."""

import io
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from patchsae_ray.data import parquet
from patchsae_ray.data.activations import ActivationCache, CacheRecord, unit_bytes, unit_file
from patchsae_ray.data.chunks import Chunk, Demand, Drawing, LaneOrder, num_lanes
from patchsae_ray.data.grains import Grain, RowGroups, SingleImages
from patchsae_ray.data.manifest import UNIT_SIZE
from patchsae_ray.data.shared_cache import SharedCache
from patchsae_ray.data.sources import build_manifest
from patchsae_ray.data.units import decode_images

IMAGES, GROUPED_IMAGES, ARCHIVE, CHUNK_IMAGES, TOKENS = 20_000, 100_000, 1000, 64, 197
SIDE, WIDTH = 12, 16


class CountedFileSystem(LocalFileSystem):
    """Local files under counted://, every byte of which is counted as it is read."""

    protocol = ("counted",)
    bytes_read = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("counted://")

    def unstrip_protocol(self, name: str) -> str:
        return f"counted://{self._strip_protocol(name)}"

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        return _Counted(path) if mode == "rb" else super()._open(path, mode, block_size, **options)


class _Counted(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        CountedFileSystem.bytes_read += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        CountedFileSystem.bytes_read += count
        return count


def picture(number: int) -> bytes:
    """A BMP of 12×12 random pixels: 486 bytes of images whose headers are a tenth of them."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def write_files(root: Path) -> None:
    for number in range(IMAGES):
        path = root / f"c{number // ARCHIVE:03d}" / f"{number:06d}.bmp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))


def write_tars(root: Path) -> None:
    for first in range(0, IMAGES, ARCHIVE):
        with tarfile.open(root / f"{first:06d}.tar", "w") as archive:
            for number in range(first, first + ARCHIVE):
                data = picture(number)
                info = tarfile.TarInfo(f"{number:06d}.bmp")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_parquet(root: Path) -> None:
    images = [{"bytes": picture(number), "path": None} for number in range(GROUPED_IMAGES)]
    pq.write_table(
        pa.table({"image": images}), root / "train-00000-of-00001.parquet", row_group_size=ARCHIVE, compression="NONE"
    )


def write_cache(root: Path) -> ActivationCache:
    for unit in range(-(-IMAGES // UNIT_SIZE)):
        positions = np.arange(unit * UNIT_SIZE, min((unit + 1) * UNIT_SIZE, IMAGES))
        residual = torch.zeros(len(positions), TOKENS, WIDTH, dtype=torch.bfloat16)
        Path(unit_file(str(root), unit)).write_bytes(unit_bytes(residual, positions, [], "key"))
    record = CacheRecord({}, "all", TOKENS, WIDTH, "bf16", -(-IMAGES // UNIT_SIZE), IMAGES, [])
    return ActivationCache(f"counted://{root}", record)


def chunks_of(grain: Grain) -> Iterator[Chunk]:
    """The chunks of about one epoch, in the order in which training wants them."""
    drawing = Drawing("tokens", TOKENS, 1.0, 128 * TOKENS)
    total = 100 * grain.num_images * TOKENS
    order = LaneOrder(grain, drawing, num_lanes(2**21, grain, drawing, total), 42, total)
    cursors = np.zeros((order.lanes, 2), np.int64)
    return islice(Demand(order, range(order.lanes), cursors), grain.num_chunks + order.lanes)


def bytes_read_share(layout: str) -> dict[str, float]:
    """images: of the data set that was read; share: bytes read over bytes used in about one epoch."""
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if layout == "cache":
            return _of_cache(write_cache(root))
        {"files": write_files, "tar": write_tars, "parquet": write_parquet}[layout](root)
        manifest = build_manifest(f"counted://{root}")
        grain: Grain = SingleImages(manifest.num_images, CHUNK_IMAGES)
        if layout == "parquet":
            grain = RowGroups(manifest.group_edges())
        CountedFileSystem.bytes_read, used = 0, 0
        parquet._groups = SharedCache(0, lambda group: group.images.nbytes)  # as where row groups do not fit
        for chunk in chunks_of(grain):
            found = decode_images(manifest, chunk.positions, SIDE)
            if found.bad:
                raise SystemExit(f"{found.bad[0]} could not be read")
            used += chunk.count * len(picture(0))
        return {"images": manifest.num_images, "share": CountedFileSystem.bytes_read / used}


def _of_cache(cache: ActivationCache) -> dict[str, float]:
    edges = np.append(np.arange(0, IMAGES, UNIT_SIZE), IMAGES)
    CountedFileSystem.bytes_read, used = 0, 0
    for chunk in chunks_of(SingleImages(IMAGES, CHUNK_IMAGES)):
        used += cache.images(chunk.positions, edges, slice(None)).values.nbytes
    return {"images": IMAGES, "share": CountedFileSystem.bytes_read / used}
