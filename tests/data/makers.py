"""Small data sets in each form, from the same pictures."""

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ["ant", "bee", "cat"]


def picture(number: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A PNG that says which one it is."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(uri: str, data: bytes) -> None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with filesystem.open(path, "wb") as file:
        file.write(data)


def make_folder(root: str, count: int) -> None:
    """Images 0..count-1 in class folders; canonical order is 0..count-1."""
    for number in range(count):
        write(f"{root}/{CLASSES[number * 3 // count]}/{number:05d}.png", picture(number))


def make_torn_folder(root: Path, count: int, torn: int) -> None:
    """A flat folder of images 000.png, 001.png, …, one of them cut short."""
    root.mkdir()
    for number in range(count):
        data = picture(number)
        (root / f"{number:03d}.png").write_bytes(data[:60] if number == torn else data)


def parquet_bytes(
    numbers: list[int],
    labels: list[object] | None,
    row_group_size: int = 7,
    names: bool = True,
    bad: tuple[int, ...] = (),
    **options: object,
) -> bytes:
    """Hugging Face's layout: image struct {bytes, path}, integer labels whose names are in the schema's metadata."""
    contents = [b"letter" if number in bad else picture(number) for number in numbers]
    image = pa.array([{"bytes": data, "path": f"{number:05d}.png"} for number, data in zip(numbers, contents, strict=True)])
    columns = {"image": image}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    if names and labels is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_size, **options)
    return buffer.getvalue()


def tar_bytes(numbers: list[int], labels: list[int] | None, long_names: bool = False, bad: tuple[int, ...] = ()) -> bytes:
    """WebDataset: s00000.png beside s00000.cls; long names make tar's extended headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index, number in enumerate(numbers):
            stem = f"{'deep/' * 40 if long_names else ''}s{number:05d}"
            members = {f"{stem}.png": b"letter" if number in bad else picture(number), f"{stem}.json": b"{}"}
            if labels is not None:
                members[f"{stem}.cls"] = str(labels[index]).encode()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
