"""The decode side imports no model library: each of a node's many decoding processes would hold it in memory."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.decoding import decoded_units, fresh_context
from patchsae_ray.pipelines.progress import start_ledger
from tests.conftest import GOLDEN, RayHead
from tests.data.makers import make_folder

MODEL_LIBRARIES = ("torch", "open_clip")

ALONE = """
import sys
from types import SimpleNamespace
import numpy as np
import ray
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.chunks import Chunk
from patchsae_ray.pipelines.chunk_rows import DecodeChunk, row_of
from patchsae_ray.pipelines.decoding import DecodeRow
ray.get = lambda value: value
ray.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "a node", get_worker_id=lambda: "a process")
calls = {"begin": 0, "end": 0, "claim": True, "died": 0}
ledger = SimpleNamespace(**{name: SimpleNamespace(remote=lambda *given, said=said: said) for name, said in calls.items()})
images = open_dataset("few", sys.argv[1], None, None)
(unit,) = DecodeRow(images, 16, ledger)({"unit": 0})
chunk = DecodeChunk(images, 16, ledger, "a stream")(row_of(Chunk(0, 0, np.array([0, 2]))))
print(unit["pixels"].shape, chunk["pixels"].shape, [name for name in sys.argv[2:] if name in sys.modules])
"""


def test_units_and_chunks_are_decoded_without_a_model_library(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "images"), 3)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "images"), *MODEL_LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(3, 16, 16, 3) (2, 16, 16, 3) []", done.stderr


@pytest.fixture
def joined(ray_head: RayHead) -> Iterator[None]:
    cluster.connect(ray_head.address)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("joined")
def test_a_decoding_process_of_ray_holds_no_model_library() -> None:
    def libraries(row: dict[str, Any]) -> dict[str, Any]:  # local, so that Ray need not import this module for it
        loaded = [name for name in MODEL_LIBRARIES if name in sys.modules]
        return {"images": len(row["pixels"]), "libraries": ",".join(loaded)}

    plan = cluster.make_plan("auto")
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    units = len(manifest.units)
    found = decoded_units(manifest, range(units), 32, plan, start_ledger(units)).map(libraries).take_all()
    assert sum(row["images"] for row in found) == manifest.num_images
    assert {row["libraries"] for row in found} == {""}


def test_what_is_set_for_one_data_set_does_not_reach_the_next() -> None:
    before = ray.data.DataContext.get_current()
    before.enable_progress_bars, shown = True, before.enable_progress_bars
    with fresh_context() as context:
        assert ray.data.DataContext.get_current() is context
        assert not context.enable_progress_bars
        context.execution_options.preserve_order = True
    with fresh_context() as context:
        assert not context.execution_options.preserve_order
    assert ray.data.DataContext.get_current() is before
    assert before.enable_progress_bars
    before.enable_progress_bars = shown
