"""Write the demonstration's Fashion-MNIST subset as parquet in the Hugging Face layout."""

import argparse
import gzip
import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from patchsae_ray.demo import DATA_DIR

logger = logging.getLogger(__name__)

DEFAULT_SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# split -> (prefix of the idx files, images kept of each class)
SPLITS = {"train": ("train", 1000), "test": ("t10k", 200)}
ROWS_PER_GROUP = 500
IDX_UNSIGNED_BYTE = 0x08

LICENCE_TEXT = """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist)
The images and labels in this folder are a subset of Fashion-MNIST, re-encoded as PNG in parquet.

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def read_idx(path: Path) -> np.ndarray:
    """Return the unsigned-byte array stored in a gzipped idx file.

    Raises:
        ValueError: the file is not an idx file of unsigned bytes.
    """
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != bytes((0, 0, IDX_UNSIGNED_BYTE)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape.tolist())


def read_split(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all images (n, 28, 28) uint8 and labels (n,) int64 of one pair of idx files."""
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    return images, labels.astype(np.int64)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Return, in file order, the indices of the first ``count`` rows of each class."""
    firsts = [np.flatnonzero(labels == label)[:count] for label in range(len(CLASS_NAMES))]
    return np.sort(np.concatenate(firsts))


def png_bytes(image: np.ndarray) -> bytes:
    """Encode one grey image as an optimised PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def parquet_schema() -> pa.Schema:
    """Return the arrow schema with the features that the ``datasets`` library reads."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(CLASS_NAMES), "_type": "ClassLabel"},
    }
    return pa.schema(
        [
            pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            pa.field("label", pa.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def write_split(source: Path, out: Path, split: str) -> Path:
    """Write one split's parquet file and return its path."""
    prefix, count = SPLITS[split]
    images, labels = read_split(source, prefix)
    rows = first_of_each_class(labels, count)
    structs = [{"bytes": png_bytes(images[row]), "path": f"{prefix}-{row:05d}.png"} for row in rows]
    schema = parquet_schema()
    table = pa.table({"image": structs, "label": labels[rows]}, schema=schema)
    path = out / f"{split}-00000-of-00001.parquet"
    # The PNGs are compressed already: no codec for them, and no dictionary of values that never repeat.
    pq.write_table(
        table,
        path,
        row_group_size=ROWS_PER_GROUP,
        compression={"image.bytes": "NONE", "image.path": "ZSTD", "label": "ZSTD"},
        use_dictionary=["label"],
        write_statistics=["label"],
    )
    return path


def main() -> None:
    """Write both splits, the class names and the licence."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE, help="folder of the idx gz files")
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        path = write_split(options.source, options.out, split)
        logger.info("%s: %d bytes", path, path.stat().st_size)
    (options.out / "classnames.json").write_text(json.dumps(list(CLASS_NAMES), indent=2) + "\n")
    (options.out / "LICENSE.fashion-mnist").write_text(LICENCE_TEXT)


if __name__ == "__main__":
    main()
