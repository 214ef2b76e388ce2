"""Folders of images: files as parts of a manifest, with the class folder of each."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from patchsae_ray import storage
from patchsae_ray.data.listing import NOTHING, Branch, Listed, joined, list_branch
from patchsae_ray.data.making import parts_of
from patchsae_ray.data.manifest import readable
from patchsae_ray.data.tables import NO_LABEL, ROWS_A_PART, Part, rows_of


@dataclass(frozen=True)
class FolderShare:
    """The image files of some branches of a folder."""

    parts: tuple[Part, ...]
    codes: np.ndarray
    """[images] int32: place of each image's class folder in `classes`; -1 without one."""
    classes: tuple[str, ...]
    flat: str
    """An image that is in no class folder, if there is one."""
    size: int
    """Bytes of all images."""


def branches_share(found: Sequence[Branch], root: str, folder: str | None) -> tuple[FolderShare, Listed]:
    """Some branches' images as a share, and what else is there."""
    listed = joined(storage.patiently(partial(list_branch, branch)) for branch in found)
    share = share_of(listed.images, root, folder)
    return share, replace(listed, images=NOTHING)


def share_of(images: pa.Table, root: str, folder: str | None) -> FolderShare:
    """A share of (path, size) in order."""
    parts: list[Part] = []
    codes = [np.zeros(0, np.int32)]
    number: dict[str, int] = {}
    flat = ""
    for start in range(0, images.num_rows, ROWS_A_PART):
        paths, sizes = (column.combine_chunks() for column in images.slice(start, ROWS_A_PART).columns)
        nothing = np.zeros(len(paths), np.int64)
        parts += parts_of(rows_of([root], nothing, paths.cast(pa.binary()), nothing, sizes.to_numpy()), folder)
        inside = pc.greater_equal(pc.find_substring(paths, pattern="/"), 0)
        heads = pc.list_element(pc.split_pattern(paths, pattern="/", max_splits=1), 0)
        heads = pc.if_else(inside, heads, None).dictionary_encode()
        local = [number.setdefault(readable(head), len(number)) for head in heads.dictionary.to_pylist()]
        places = heads.indices.fill_null(len(local)).to_numpy()
        codes.append(np.array([*local, NO_LABEL], np.int32)[places])
        if NO_LABEL in codes[-1]:
            flat = flat or readable(paths[int(np.argmin(codes[-1]))].as_py())
    return FolderShare(tuple(parts), np.concatenate(codes), tuple(number), flat, pc.sum(images["size"]).as_py() or 0)


def file_entries(parts: Iterable[Part]) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, nothing else) of each image, for `manifest_digest`; few of them are in memory at a time."""
    for part in parts:
        for batch in part.each():
            for name, size in zip(batch.column("name").to_pylist(), batch.column("size").to_pylist(), strict=True):
                yield os.fsdecode(name), size, ""
