"""The format of kept activations: read back equal by byte range, damage and misfits named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patchsae_ray.data.activations import ActivationCache, CacheRecord, read_record, unit_bytes, unit_file
from patchsae_ray.data.chunks import Chunk
from patchsae_ray.errors import UserError

T, D = 4, 6
RECORD = CacheRecord({"clip": "x"}, "all", T, D, "bf16", 2, 20, [(13, "torn.png", "torn")])


@pytest.fixture
def residual() -> torch.Tensor:
    return torch.randn(9, T, D, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.fixture
def cache(tmp_path: Path, residual: torch.Tensor) -> ActivationCache:
    positions = np.array([10, 11, 12, 14, 15, 16, 17, 18, 19])
    Path(unit_file(str(tmp_path), 1)).write_bytes(unit_bytes(residual, positions, [(13, "torn.png", "torn")], "key"))
    (tmp_path / "cache.json").write_bytes(RECORD.to_json())
    return ActivationCache(str(tmp_path), read_record(str(tmp_path)))


@pytest.mark.parametrize(("first", "count", "rows"), [(0, 4, [0, 1, 2]), (4, 4, [3, 4, 5, 6]), (8, 2, [7, 8]), (3, 1, [])])
def test_a_chunk_reads_back_equal(
    cache: ActivationCache, residual: torch.Tensor, first: int, count: int, rows: list[int]
) -> None:
    found = cache.chunk(Chunk(1, first, count), 10, slice(None))
    assert torch.equal(found.values, residual[rows])
    assert found.positions.tolist() == [10 + first + index for index in range(count) if 10 + first + index != 13]
    assert found.bad == ([(13, "torn.png", "torn")] if first <= 3 < first + count else [])
    assert torch.equal(cache.chunk(Chunk(1, first, count), 10, slice(1, T)).values, residual[rows][:, 1:])


def test_any_safetensors_reader_reads_it(cache: ActivationCache, residual: torch.Tensor) -> None:
    found = load_file(unit_file(cache.folder, 1))
    assert torch.equal(found["residual"], residual)
    assert found["positions"].tolist() == [10, 11, 12, 14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("keep", [0, 5, 100, -3])
def test_a_truncated_file_is_named(cache: ActivationCache, keep: int) -> None:
    path = Path(unit_file(cache.folder, 1))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"unit-00000001.safetensors is not a whole unit"):
        cache.chunk(Chunk(1, 0, 4), 10, slice(None))


def test_a_missing_file_is_named(cache: ActivationCache) -> None:
    with pytest.raises(UserError, match=r"no such file: .*unit-00000000.safetensors"):
        cache.chunk(Chunk(0, 0, 4), 0, slice(None))


def test_a_file_that_is_not_what_the_record_says(cache: ActivationCache) -> None:
    other = ActivationCache(cache.folder, replace(RECORD, width=D + 1))
    with pytest.raises(UserError, match=r"holds \[9, 4, 6\] BF16, which is not what cache.json says"):
        other.chunk(Chunk(1, 0, 4), 10, slice(None))


def test_no_record_and_a_later_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cache.json there"):
        read_record(str(tmp_path))
    (tmp_path / "cache.json").write_text(json.dumps({**json.loads(RECORD.to_json()), "format": 2}))
    with pytest.raises(UserError, match="format 2, expected 1"):
        read_record(str(tmp_path))
    (tmp_path / "cache.json").write_text('{"bad": []}')
    with pytest.raises(UserError, match="no record of cached activations"):
        read_record(str(tmp_path))
