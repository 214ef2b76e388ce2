"""The format of kept activations: read back equal by byte range, damage and misfits named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patchsae_ray import storage
from patchsae_ray.data.activations import ActivationCache, CacheRecord, read_record, unit_bytes, unit_file
from patchsae_ray.errors import UserError

T, D = 4, 6
EDGES = np.array([0, 10, 20])
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


@pytest.mark.parametrize(
    ("positions", "rows"), [([10, 11, 12], [0, 1, 2]), ([19, 10, 16, 14], [8, 0, 5, 3]), ([18, 13, 11], [7, 1]), ([13], [])]
)
def test_single_images_read_back_equal_in_the_order_asked_for(
    cache: ActivationCache, residual: torch.Tensor, positions: list[int], rows: list[int]
) -> None:
    found = cache.images(np.array(positions), EDGES, slice(None))
    assert torch.equal(found.values, residual[rows])
    assert found.positions.tolist() == [position for position in positions if position != 13]
    assert found.bad == ([(13, "torn.png", "torn")] if 13 in positions else [])
    assert torch.equal(cache.images(np.array(positions), EDGES, slice(1, T)).values, residual[rows][:, 1:])


def test_only_the_bytes_of_the_images_are_read(cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.images(np.array([10]), EDGES, slice(None))  # the unit's header
    asked: list[tuple[str, int, int]] = []
    read = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda ranges: asked.extend(ranges) or read(ranges))
    cache.images(np.array([12, 19, 15]), EDGES, slice(1, 3))
    assert [end - begin for _, begin, end in asked] == [2 * D * 2] * 3


def test_an_image_that_a_unit_should_have_is_named(cache: ActivationCache) -> None:
    with pytest.raises(UserError, match=r"unit-00000001.safetensors has no image 20, which is not what cache.json says"):
        cache.images(np.array([20]), np.array([0, 10, 21]), slice(None))


def test_any_safetensors_reader_reads_it(cache: ActivationCache, residual: torch.Tensor) -> None:
    found = load_file(unit_file(cache.folder, 1))
    assert torch.equal(found["residual"], residual)
    assert found["positions"].tolist() == [10, 11, 12, 14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("keep", "says"), [(0, "is not a whole unit"), (5, "is not a whole unit"), (100, "is cut short"), (-3, "is cut short")]
)
def test_a_truncated_file_is_named(cache: ActivationCache, keep: int, says: str) -> None:
    path = Path(unit_file(cache.folder, 1))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"unit-00000001.safetensors {says}"):
        cache.images(np.array([10, 19]), EDGES, slice(None))


def test_a_missing_file_is_named(cache: ActivationCache) -> None:
    with pytest.raises(UserError, match=r"no such file: .*unit-00000000.safetensors"):
        cache.images(np.array([0, 11]), EDGES, slice(None))


def test_a_file_that_is_not_what_the_record_says(cache: ActivationCache) -> None:
    other = ActivationCache(cache.folder, replace(RECORD, width=D + 1))
    with pytest.raises(UserError, match=r"holds \[9, 4, 6\] BF16, which is not what cache.json says"):
        other.images(np.array([10, 11]), EDGES, slice(None))


def test_no_record_and_a_later_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cache.json there"):
        read_record(str(tmp_path))
    (tmp_path / "cache.json").write_text(json.dumps({**json.loads(RECORD.to_json()), "format": 2}))
    with pytest.raises(UserError, match="format 2, expected 1"):
        read_record(str(tmp_path))
    (tmp_path / "cache.json").write_text('{"bad": []}')
    with pytest.raises(UserError, match="no record of cached activations"):
        read_record(str(tmp_path))
