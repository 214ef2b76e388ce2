"""Accumulators on the wire: named arrays in one block of bytes, without pickle."""

import numpy as np
from safetensors.numpy import load, save

Arrays = dict[str, np.ndarray]


def to_bytes(arrays: Arrays) -> bytes:
    """Named arrays as one safetensors block."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def from_bytes(data: bytes) -> Arrays:
    """The arrays of `to_bytes`, writable."""
    return {name: array.copy() for name, array in load(data).items()}


def prefixed(prefix: str, arrays: Arrays) -> Arrays:
    """The same arrays under `prefix/name`, so that several accumulators share a block."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def without_prefix(prefix: str, arrays: Arrays) -> Arrays:
    """The arrays that `prefixed` put under `prefix`."""
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
