"""Small tables and arrays as the bytes of a file."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from patchsae_ray.redaction import redacted

ERRORS_FILE = "errors.parquet"
"""Beside every result: the images that could not be read."""


def errors_parquet(bad: list[tuple[int, str, str]]) -> bytes:
    """errors.parquet: position, path and reason of each unreadable image, by position; secrets of URIs are hidden."""
    rows = sorted(bad)
    table = pa.table(
        {
            "position": pa.array([position for position, _, _ in rows], pa.int64()),
            "path": pa.array([redacted(path) for _, path, _ in rows], pa.string()),
            "reason": pa.array([redacted(reason) for _, _, reason in rows], pa.string()),
        }
    )
    return parquet_bytes(table)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(tensor.contiguous(), buffer)
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as numpy.save writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
