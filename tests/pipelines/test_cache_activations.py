"""jobs/cache_activations.py on a real S3 server, killed in mid-run; the three sources of tokens give identical batches."""

import hashlib
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load as load_safetensors

from patchsae_ray import storage
from patchsae_ray.data.activations import ActivationCache, CacheRecord, read_record, unit_file
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.chunks import Demand
from patchsae_ray.data.manifest import UNIT_SIZE, Manifest
from patchsae_ray.data.mixing import TokenMixer
from patchsae_ray.data.units import decode_unit
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.cached import CacheTask
from patchsae_ray.pipelines.model import LoadedModel, load_model
from patchsae_ray.pipelines.streamed import Streamed, TowerTask
from patchsae_ray.pipelines.token_sources import Cached, ChunkSource, Fused
from patchsae_ray.pipelines.train import order_of
from patchsae_ray.pipelines.train_board import TrainBoard
from patchsae_ray.pipelines.train_plan import plan_training
from patchsae_ray.settings import TrainSettings
from tests.conftest import JobRunner, RayHead, S3Server
from tests.data.makers import make_torn_folder, parquet_bytes
from tests.pipelines.commands import start, wait_for
from tests.pipelines.test_training import MODEL, checkpoint, trainer_under

pytestmark = pytest.mark.ray

IMAGES = 3 * UNIT_SIZE + 100
TORN = 700


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    path.write_bytes(parquet_bytes(list(range(IMAGES)), None, row_group_size=100))
    return str(path)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(TrainSettings(backbone=MODEL[1], clip_weights=MODEL[3]))


def cache_here(folder: Path, model: LoadedModel, manifest: Manifest, batch_size: int) -> ActivationCache:
    """A cache made in this process."""
    task = CacheTask(model.portable("fp32"), "all", "bf16", batch_size, str(folder), "key")
    worker = task.start("cpu")
    for unit in manifest.units:
        worker.process(decode_unit(unit, manifest.reading, model.config.image_size), lambda images: None)
    t = model.config.num_patches + 1
    record = CacheRecord({}, "all", t, model.config.width, "bf16", len(manifest.units), manifest.num_images, [])
    return ActivationCache(str(folder), record)


def digest_of_batches(source: ChunkSource, settings: TrainSettings, model: LoadedModel, manifest: Manifest) -> str:
    """Of the first 100 global batches."""
    order = order_of(settings, model, manifest)
    cursors = np.zeros((order.lanes, 2), np.int64)
    demand = Demand(order, range(order.lanes), cursors)
    chunks = source.chunks(demand)
    mixer = TokenMixer(order, range(order.lanes), demand, chunks, cursors, 0)
    hasher = hashlib.sha256()
    for step in range(100):
        hasher.update(mixer.step(step).x.contiguous().view(torch.uint8).numpy())
    chunks.close()  # type: ignore[attr-defined]
    return hasher.hexdigest()


def test_the_three_sources_give_identical_batches(ray_head: RayHead, data: str, model: LoadedModel, tmp_path: Path) -> None:
    settings = TrainSettings(
        backbone=MODEL[1], clip_weights=MODEL[3], dataset_name="many", dataset_path=data, clip_batch_size=16, batch_size=20,
        total_training_images=2000, source="streamed", ray_address=ray_head.address,
    )  # fmt: skip
    manifest = open_dataset("many", data, None, None)
    plan = plan_training(settings)
    try:
        task = TowerTask(model.portable("fp32"), "all", "bf16", 16)
        order, image_size = order_of(settings, model, manifest), model.config.image_size
        board = ray.remote(TrainBoard).options(num_cpus=0).remote(IMAGES, 0.0)
        cache = cache_here(tmp_path, model, manifest, 16)
        sources = [
            Fused(manifest, image_size, task.start("cpu")),
            Cached(cache, manifest, slice(None), "bf16", order.lanes),
            Streamed(manifest, image_size, task, order, plan, board, order.lanes, model.config.width),
        ]
        digests = [digest_of_batches(source, settings, model, manifest) for source in sources]
    finally:
        ray.shutdown()
    assert digests[0] == digests[1] == digests[2]
    other = digest_of_batches(sources[1], replace(settings, seed=1), model, manifest)
    assert other != digests[0]


@pytest.fixture(scope="module")
def s3_cache(
    ray_head: RayHead, ready_mlflow: Path, s3_server: S3Server, data: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """(cache on S3, the last driver's output): written by a driver that was killed and by one that finished."""
    assert s3_server
    folder, root = tmp_path_factory.mktemp("cache"), "s3://bucket/cache"
    flags = [*MODEL, "--dataset_name", "many", "--dataset_path", data, "--batch_size", "16", "--commit_seconds", "0"]
    job = start(ray_head, ready_mlflow, folder / "first", root, *flags, job="cache_activations")

    def units() -> list[str]:
        return [entry.path for entry in storage.entries(storage.join(root, "out/activations")) if "unit-" in entry.path]

    wait_for(units)
    job.kill()
    assert job.wait(10) == -signal.SIGKILL
    assert 0 < len(units()) < 4
    again = start(ray_head, ready_mlflow, folder / "again", root, *flags, job="cache_activations")
    assert again.wait(200) == 0, (folder / "again" / "err").read_text()
    assert len(units()) == 4
    return storage.join(root, "out/activations", units()[0].rsplit("/", 1)[0]), (folder / "again" / "out").read_text()


def test_a_killed_cache_is_finished_with_every_unit_once(
    s3_cache: tuple[str, str], data: str, model: LoadedModel, tmp_path: Path
) -> None:
    cache, said = s3_cache
    record = read_record(cache)
    assert (record.num_images, record.num_units, record.dtype, record.width) == (IMAGES, 4, "bf16", 128)
    assert f"--activations {cache}" in said
    manifest = open_dataset("many", data, None, None)
    direct = cache_here(tmp_path, model, manifest, 16)
    positions = []
    for unit in range(4):
        found = load_safetensors(storage.read_bytes(unit_file(cache, unit)))
        expected = load_safetensors(storage.read_bytes(unit_file(direct.folder, unit)))
        assert torch.equal(found["residual"], expected["residual"])
        positions += found["positions"].tolist()
    assert positions == list(range(IMAGES))
    left = [entry.path for entry in storage.entries(cache) if entry.path.endswith(".bundle")]
    assert not left


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--block_layer", "-3"], "is of another layer (2 there, 1 here)"),
        (["--backbone", "demo"], "is of another CLIP ("),
        (["--activation_dtype", "fp32"], "holds bf16, --activation_dtype is fp32; bf16 would be right"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_by_name(
    ready_mlflow: Path, s3_cache: tuple[str, str], data: str, tmp_path: Path, flags: list[str], says: str
) -> None:
    clip = [] if flags[0] == "--backbone" else MODEL
    common = ["--dataset_name", "many", "--dataset_path", data, "--num_workers", "0", "--total_training_images", "64"]
    with pytest.raises(UserError, match=re.escape(f"--activations {s3_cache[0]} {says}")):
        trainer_under(tmp_path, ready_mlflow)(*clip, *common, "--activations", s3_cache[0], *flags)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_training_on_a_cache_on_s3(ready_mlflow: Path, s3_cache: tuple[str, str], data: str, tmp_path: Path) -> None:
    flags = [*MODEL, "--dataset_name", "many", "--dataset_path", data, "--num_workers", "0", "--batch_size", "20"]
    flags += ["--total_training_images", "400", "--clip_batch_size", "16", "--expansion_factor", "4", "--tokens", "patch"]
    train_here = trainer_under(tmp_path, ready_mlflow)
    train_here(*flags, "--run_name", "cached", "--activations", s3_cache[0])
    train_here(*flags, "--run_name", "fused")
    assert checkpoint(tmp_path, "cached").digest == checkpoint(tmp_path, "fused").digest


def test_unreadable_images_of_a_cache_are_known_in_training(run_command: JobRunner, ready_mlflow: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    make_torn_folder(images, 60, torn=7)
    data = [*MODEL, "--dataset_name", "torn", "--dataset_path", str(images), "--max_bad_fraction", "0.05"]
    made = run_command("cache_activations", tmp_path, *data)
    assert made.code == 0, made.err
    cache = next((tmp_path / "out" / "activations" / "base" / "torn").iterdir())
    assert [row[:2] for row in json.loads((cache / "cache.json").read_text())["bad"]] == [[7, "007.png"]]
    train_here = trainer_under(tmp_path, ready_mlflow)
    flags = [*data, "--num_workers", "0", "--total_training_images", "60", "--expansion_factor", "2"]
    flags += ["--activations", str(cache), "--run_name"]
    assert train_here(*flags, "torn")["bad_images"] == 1
    unit = cache / "unit-00000000.safetensors"
    unit.write_bytes(unit.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{unit} is cut short: .*; without it jobs/cache_activations.py"):
        train_here(*flags, "cut")
    assert not (tmp_path / "out" / "checkpoints" / "cut" / "sae.pt").exists()
    anew = run_command("cache_activations", tmp_path, *data, "--overwrite")
    assert anew.code == 0, anew.err
    train_here(*flags, "cut")
    assert checkpoint(tmp_path, "cut").digest == checkpoint(tmp_path, "torn").digest
