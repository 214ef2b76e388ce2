"""Keeping activations (`jobs/cache_activations.py`), and training on them: what a cache is of, and whether it fits a run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchsae_ray import storage
from patchsae_ray.data.activations import (
    CACHE_FILE,
    DTYPES,
    ActivationCache,
    CacheRecord,
    read_record,
    unit_bytes,
    unit_file,
)
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import DecodedUnit
from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.image_errors import check_finite
from patchsae_ray.names import ActivationDtype, Tokens
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.heartbeat import check_nobody_works
from patchsae_ray.pipelines.manifests import ManifestTasks
from patchsae_ray.pipelines.model import LoadedModel, PortableModel, load_model
from patchsae_ray.pipelines.passes import Pass, UnitPass
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet
from patchsae_ray.pipelines.token_sources import ChunkTower
from patchsae_ray.settings import CacheSettings, TrainSettings
from patchsae_ray.writing import create, remove_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheTask:
    """What the actors run: CLIP over a unit, and its activations into the unit's file."""

    model: PortableModel
    tokens: Tokens
    dtype: ActivationDtype
    batch_size: int
    folder: str
    key: str

    def start(self, device: str) -> "CacheWorker":
        return CacheWorker(self, device)


class CacheWorker:
    """CLIP on its device, turning units into files."""

    def __init__(self, task: CacheTask, device: str) -> None:
        backbone = task.model.build_backbone(device)
        self._task = task
        self._tower = ChunkTower(backbone, backbone.token_slice(task.tokens), task.dtype, task.batch_size, device)

    def process(self, unit: DecodedUnit, report: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """Write a unit's file unless an earlier run has; its number of images and of bytes, and stage times.

        Raises: ImageError for activations that are not finite.
        """
        task, uri = self._task, unit_file(self._task.folder, unit.index)
        self._tower.timer.seconds = {}
        self._tower.timer.mark("idle")
        if storage.patiently(lambda: storage.exists(uri)):
            return _counts(len(unit.pixels), storage.size(uri)), {}
        step = task.batch_size
        parts = []
        for slots in range(0, _span(unit), step):  # by place in the unit, as training cuts it, and not by what is readable
            low, high = np.searchsorted(unit.positions, _first(unit) + np.array([slots, slots + step]))
            parts.append(self._tower.tokens(unit.pixels[low:high]))
            report(int(high))
        residual = torch.cat(parts) if parts else self._tower.tokens(unit.pixels)
        check_finite(unit.positions, activations=residual)
        data = unit_bytes(residual, unit.positions, unit.bad, task.key)
        storage.patiently(lambda: create(uri, data))
        self._tower.timer.mark("write")
        return _counts(len(unit.pixels), len(data)), {
            stage: seconds for stage, seconds in self._tower.timer.seconds.items() if stage != "idle"
        }


def _span(unit: DecodedUnit) -> int:
    """Places of the unit, from its first image to its last."""
    last = max([int(unit.positions[-1])] if len(unit.positions) else [], default=-1)
    return max([last, *(position for position, _, _ in unit.bad)], default=-1) + 1 - _first(unit)


def _first(unit: DecodedUnit) -> int:
    """Position of the unit's first image."""
    return min([*unit.positions[:1].tolist(), *(position for position, _, _ in unit.bad)], default=0)


def _counts(images: int, size: int) -> Arrays:
    return {"counts": np.array([images, size], dtype=np.int64)}


class CacheTotals:
    """Images and bytes of any number of units."""

    def __init__(self) -> None:
        self.counts = np.zeros(2, dtype=np.int64)

    def add(self, arrays: Arrays) -> None:
        """Take in a unit's, or another's `to_arrays`."""
        self.counts = self.counts + arrays["counts"]

    def to_arrays(self) -> Arrays:
        return {"counts": self.counts}


def cache_activations(settings: CacheSettings) -> dict[str, float]:
    """`jobs/cache_activations.py`: write a file of activations for each unit, and cache.json. Returns the summary's numbers.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    model = load_model(settings)
    manifest = open_dataset(
        settings.dataset_name, settings.dataset_path, settings.split, None, settings.root_dir, settings.relist,
        ManifestTasks(settings.ray_address, settings.root_dir),
    )  # fmt: skip
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = cache_identity(settings, model, manifest, precision)
        uri = cache_folder(settings, model, identity)
        folders[precision] = ResultFolder(
            uri, "cache_activations", identity, dict.fromkeys([CACHE_FILE, ERRORS_FILE], run_key(identity)),
            elsewhere="--root_dir",
        )  # fmt: skip

    def work(session: Session) -> Made:
        return _run(settings, model, manifest, session)

    summary = run_once(settings, folders, work, repeats=True)
    uri = next(folder.uri for folder in folders.values() if folder.done_meanwhile())
    log.info(
        "cache_activations: %s images, %.2f GiB; train on them with --activations %s",
        f"{summary['images']:,.0f}", summary["bytes"] / 2**30, uri,
    )  # fmt: skip
    return summary


def _run(settings: CacheSettings, model: LoadedModel, manifest: Manifest, session: Session) -> Made:
    folder = storage.absolute(session.folder.uri)
    if settings.overwrite:
        check_nobody_works(storage.join(folder, "bundles"))
        remove_tree(folder, keep="mlflow")  # where the MLflow run that was just opened is noted
    precision, key = session.plan.precision, session.folder.key
    task = CacheTask(model.portable(precision), settings.tokens, settings.activation_dtype, settings.batch_size, folder, key)
    totals, kept = UnitPass(
        "cache_activations", manifest, model.config.image_size, task, CacheTotals, session, key,
        settings.max_bad_fraction, settings.no_progress_minutes, settings.commit_seconds,
    ).run()  # fmt: skip
    width, t = model.config.width, model.tokens_per_image(settings.tokens)
    _write_given_up(kept, manifest, folder, key, torch.empty(0, t, width, dtype=DTYPES[settings.activation_dtype]))
    _check_there(folder, manifest)
    record = CacheRecord(
        dict(session.folder.identity), settings.tokens, t, width, settings.activation_dtype, len(manifest.units),
        manifest.num_images, kept.bad,
    )  # fmt: skip
    images, size = (float(count) for count in totals.counts)
    wall = kept.wall_seconds()
    summary = {
        "images": images, "bytes": size, "units": float(len(manifest.units)), "bad_images": float(len(kept.bad)),
        "wall_seconds": wall, "images_per_second": kept.images_per_second(),
    }  # fmt: skip
    files = {CACHE_FILE: record.to_json(), ERRORS_FILE: errors_parquet(kept.bad)}
    return Made(files, summary, summary, {"source": manifest.source, **kept.record()}, spent=kept.bundles)


def _write_given_up(kept: Pass, manifest: Manifest, folder: str, key: str, nothing: torch.Tensor) -> None:
    """A file without images for each unit that was given up."""
    for unit in sorted({manifest.units.at(position) for position, _, _ in kept.failed}):
        rows = [row for row in kept.failed if manifest.units.at(row[0]) == unit]
        create(unit_file(folder, unit), unit_bytes(nothing, np.zeros(0, np.int64), rows, key))


def _check_there(folder: str, manifest: Manifest) -> None:
    """See that all units' files are where this machine looks.

    Raises: UserError where the actors wrote them elsewhere.
    """
    there = {entry.path for entry in storage.entries(folder)}
    missing = [unit for unit in range(len(manifest.units)) if unit_file("", unit).lstrip("/") not in there]
    if missing:
        raise UserError(
            f"{unit_file(folder, missing[0])} and {len(missing) - 1} more are not there: actors on other machines wrote to "
            "their own disks; --root_dir on storage that all machines share would be right"
        )


def cache_identity(settings: CacheSettings, model: LoadedModel, manifest: Manifest, precision: str) -> dict[str, Any]:
    """What the activations depend on."""
    return {
        **model.identity(precision),
        "manifest": manifest.digest,
        "tokens": settings.tokens,
        "activation_dtype": settings.activation_dtype,
        "clip_batch_size": settings.batch_size,
        **_cut_of(manifest),
    }


def _cut_of(manifest: Manifest) -> dict[str, str]:
    """What unit files depend on beside their images; nothing where units are the 512 images that every version cut."""
    return {"units": manifest.cut} if manifest.cut else {}


def cache_folder(settings: CacheSettings, model: LoadedModel, identity: dict[str, Any]) -> str:
    """{root_dir}/out/activations/{vit_type}/{dataset_name}/ and a name made of the hook, the tokens, the dtype and a digest."""
    name = f"block{model.block_layer}_{settings.tokens}_{settings.activation_dtype}_{run_key(identity)[:8]}"
    return storage.join(settings.root_dir, "out", "activations", settings.vit_type, settings.dataset_name, name)


def open_cache(settings: TrainSettings, model: LoadedModel, manifest: Manifest) -> ActivationCache:
    """The cache of `--activations`, which must be of this run's CLIP, hook, images and tokens.

    Raises: UserError that names the first difference.
    """
    folder = settings.activations or ""
    record = read_record(folder)
    wanted = {**model.identity("any"), "manifest": manifest.digest}
    for name, value in wanted.items():
        if name != "precision" and record.identity.get(name) != value:
            raise UserError(
                f"--activations {folder} is of another {_CALLED.get(name, name)} ({str(record.identity.get(name))[:24]} there, "
                f"{str(value)[:24]} here)"
            )
    if record.identity.get("units", "") != manifest.cut:
        raise UserError(
            f"--activations {folder} is of other units of the same images; jobs/cache_activations.py would make one that fits"
        )
    cached_tokens(record, settings, model)
    if record.dtype == "bf16" and settings.activation_dtype == "fp32":
        raise UserError(f"--activations {folder} holds bf16, --activation_dtype is fp32; bf16 would be right")
    if record.identity["clip_batch_size"] != settings.clip_batch_size:
        log.info(
            "%s was made with forward passes of %d images, --clip_batch_size is %d: last bits may differ",
            folder, record.identity["clip_batch_size"], settings.clip_batch_size,
        )  # fmt: skip
    return ActivationCache(storage.absolute(folder), record)


_CALLED = {
    "clip": "CLIP", "block_layer": "layer", "manifest": "data set", "adapter": "adapter", "preprocessing": "preprocessing",
}  # fmt: skip


def cached_tokens(record: CacheRecord, settings: TrainSettings, model: LoadedModel) -> slice:
    """Which of the cached tokens `--tokens` means.

    Raises: UserError where they are not in the cache.
    """
    patches = model.config.num_patches
    image = {"all": slice(None), "image": slice(0, patches + 1), "patch": slice(1, patches + 1), "cls": slice(0, 1)}
    if record.tokens == settings.tokens:
        return slice(None)
    if record.tokens == "all" or (record.tokens == "image" and settings.tokens != "all"):
        return image[settings.tokens]
    raise UserError(f"--activations {settings.activations} holds --tokens {record.tokens}, not {settings.tokens}")
