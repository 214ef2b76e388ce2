"""Images into memory, as the jobs see them: for a notebook."""

from collections.abc import Sequence
from itertools import islice
from os import PathLike, fspath

import numpy as np
import torch
from torch import Tensor

from patchsae_ray import configs, storage
from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.images import BadImage, decode
from patchsae_ray.data.units import decode_unit
from patchsae_ray.errors import UserError

StrPath = str | PathLike[str]


def load_images(source: StrPath | Sequence[StrPath], size: int | Backbone, limit: int | None = None) -> Tensor:
    """Pixels as the jobs make them: uint8 [n, size, size, 3] on the CPU.

    Args:
        source: paths or URIs of image files; or a folder, a Parquet file or a tar; or a name in configs/datasets.
        size: side of the images in pixels, or the backbone that they are for.
        limit: only so many, the first; all where it is left out.

    Raises: UserError that names what is not there, or the first image that cannot be read.
    """
    side = size if isinstance(size, int) else size.config.image_size
    if isinstance(source, (str, PathLike)):
        return _of_data_set(fspath(source), side, limit)
    pixels = [_of_file(fspath(path), side) for path in islice(source, limit)]
    return torch.from_numpy(np.stack(pixels)) if pixels else _none(side)


def _of_file(path: str, side: int) -> np.ndarray:
    try:
        return decode(storage.read_bytes(path), side)
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error


def _of_data_set(source: str, side: int, limit: int | None) -> Tensor:
    named = source in configs.names("datasets")
    manifest = open_dataset(source if named else "images", None if named else source, None, None)
    found, left = [], manifest.num_images if limit is None else limit
    for unit in manifest.units:
        if left <= 0:
            break
        decoded = decode_unit(unit, manifest.reading, side, 0, min(left, unit.count))
        if decoded.bad:
            _, path, reason = decoded.bad[0]
            raise UserError(f"{manifest.source}: {path}: {reason}")
        found.append(torch.from_numpy(decoded.pixels))
        left -= unit.count
    return torch.cat(found) if found else _none(side)


def _none(side: int) -> Tensor:
    return torch.zeros(0, side, side, 3, dtype=torch.uint8)
