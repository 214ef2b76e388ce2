"""Training an autoencoder: Ray Data streams decoded images to one trainer, a Ray task with the model on its device.

The trainer sends what it learns to the driver as it goes (a streaming generator); the driver writes files and logs.
"""

import logging
import math
import time
from typing import Any

import numpy as np
import ray
import torch

from patchsae_ray import storage
from patchsae_ray.backbone.weights import state_digest
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.shuffle import unit_order
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.model import LoadedModel, load_model
from patchsae_ray.pipelines.passes import Pass
from patchsae_ray.pipelines.progress import LINE_SECONDS, progress_line
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet
from patchsae_ray.pipelines.train_worker import Message, TrainTask, checkpoint_steps, train_units
from patchsae_ray.sae.checkpoint import safetensors_bytes, torch_bytes
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.settings import TrainSettings, as_dict

log = logging.getLogger(__name__)

PATCHSAE_TOTAL_IMAGES = 2_621_440


def train(settings: TrainSettings) -> dict[str, float]:
    """`jobs/train.py`: write sae.pt and sae.safetensors. Returns the summary's numbers.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    model = load_model(settings)
    manifest = open_dataset(
        settings.dataset_name, settings.dataset_path, settings.split, None, settings.root_dir, settings.relist
    )
    total_images = images_to_train_on(settings, model)
    uri = checkpoint_folder(settings, model, manifest, total_images)
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = _identity(settings, model, manifest, precision, total_images)
        names = ["sae.pt", "sae.safetensors", ERRORS_FILE, *_checkpoint_names(settings, total_images)]
        outputs = dict.fromkeys(names, run_key(identity))
        folders[precision] = ResultFolder(uri, "train", identity, outputs, elsewhere="--run_name")

    def work(session: Session) -> Made:
        return run_training(settings, model, manifest, total_images, session)

    summary = run_once(settings, folders, work)
    log_summary(summary, uri)
    return summary


def run_training(settings: TrainSettings, model: LoadedModel, manifest: Manifest, total_images: int, session: Session) -> Made:
    """Run the trainer on Ray and take its messages; checkpoints on the way are written as they come.

    Raises: UserError past `--max_bad_fraction` or where the loss stops being finite.
    """
    plan, manifest = session.plan, keep(manifest)
    readable = manifest.num_images * (1 - min(settings.max_bad_fraction, 0.5))
    epochs = math.ceil(total_images / max(1.0, readable))
    order = tuple(unit_order(len(manifest.units), epochs, settings.seed))
    task = TrainTask(model.portable(plan.precision), settings, total_images, order)
    log.info(
        "train: %s images in %s steps of %d, %s latents", f"{total_images:,}", f"{task.total_steps:,}",
        settings.batch_size, f"{model.config.width * settings.expansion_factor:,}",
    )  # fmt: skip
    remote = ray.remote(train_units).options(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus, max_retries=0)
    kept = Pass(settings.max_bad_fraction, manifest.num_images, len(manifest.units))
    config = checkpoint_config(settings, model, total_images)
    progress = _TrainProgress(total_images)
    for reference in remote.remote(ray.put(task), manifest, model.config.image_size, plan):
        message: Message = _get(reference)
        kept.notes.bad.extend(message.bad)
        kept.check()
        session.tracker.metrics({f"train_{name}": value for name, value in message.metrics.items()}, message.step)
        progress.show(message)
        if message.weights is not None:
            sae = SparseAutoencoder.from_tensors(
                {key: torch.from_numpy(np.array(value)) for key, value in message.weights.items()}
            )
            for name, data in _checkpoint_files(sae, message, config).items():
                session.folder.write(name, data)
    kept.notes.seconds, kept.notes.peak_bytes = message.seconds, message.peak_bytes
    summary = _summary(message, kept)
    record = {"source": manifest.source, **kept.record()}
    made = {"sae": state_digest(sae.state_dict())}
    files = {ERRORS_FILE: errors_parquet(kept.bad)}
    return Made(files, summary, summary, record, step=message.step, tags=made)


def _summary(message: Message, kept: Pass) -> dict[str, float]:
    wall = kept.wall_seconds()
    return {
        **message.metrics,
        "images": float(message.images),
        "steps": float(message.step),
        "bad_images": float(len(kept.bad)),
        "wall_seconds": wall,
        "images_per_second": message.images / wall,
    }


def _checkpoint_files(sae: SparseAutoencoder, message: Message, config: dict[str, Any]) -> dict[str, bytes]:
    if message.last:
        return {"sae.pt": torch_bytes(sae, config), "sae.safetensors": safetensors_bytes(sae, config)}
    return {f"sae_{message.images}_images.pt": torch_bytes(sae, config)}


def _get(reference: Any) -> Message:
    try:
        message: Message = ray.get(reference)
        return message
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FloatingPointError):
            raise UserError(f"training stopped: {error.cause}; a lower --lr or another --precision would be right") from error
        raise


class _TrainProgress:
    """A line every ten seconds with the loss."""

    def __init__(self, total_images: int) -> None:
        self._total = total_images
        self._first: tuple[float, int] | None = None
        self._last_line = time.monotonic()

    def show(self, message: Message) -> None:
        now = time.monotonic()
        self._first = self._first or (now, message.images)
        if now - self._last_line >= LINE_SECONDS:
            line = progress_line("train", message.images, self._total, message.images - self._first[1], now - self._first[0])
            log.info("%s, loss %.5f, L0 %.1f", line, message.metrics["loss"], message.metrics["l0"])
            self._last_line = now


def images_to_train_on(settings: TrainSettings, model: LoadedModel) -> int:
    """`--total_training_images`, or as many whole images as `--total_training_tokens` needs."""
    if settings.total_training_tokens is None:
        return settings.total_training_images or PATCHSAE_TOTAL_IMAGES
    patches = model.config.num_patches
    tokens = {"all": patches + 1 + model.adapter.num_prompt_tokens, "image": patches + 1, "patch": patches, "cls": 1}[
        settings.tokens
    ]
    return math.ceil(settings.total_training_tokens / tokens)


def checkpoint_folder(settings: TrainSettings, model: LoadedModel, manifest: Manifest, total_images: int) -> str:
    """{root_dir}/out/checkpoints/{run_name}; where none is given, a name made of the settings with a digest of them all."""
    everything = run_key(_identity(settings, model, manifest, settings.precision, total_images))
    backbone = model.config.name.rsplit("/", 1)[-1].removesuffix(".json")
    made = (
        f"{settings.dataset_name}_{backbone}_block{model.block_layer}_{settings.tokens}_x{settings.expansion_factor}"
        f"_l1{settings.l1_coefficient:g}_lr{settings.lr:g}_{total_images}images_seed{settings.seed}_{everything[:6]}"
    )
    return storage.join(settings.root_dir, "out", "checkpoints", settings.run_name or made)


def checkpoint_config(settings: TrainSettings, model: LoadedModel, total_images: int) -> dict[str, Any]:
    """The cfg of the checkpoint: what the released code looks up, what `--backbone` may be left out for, and the recipe."""
    recipe = {key: value for key, value in as_dict(settings).items() if key not in _NOT_RECIPE}
    return {
        **recipe,
        "model_name": model.config.name,
        "block_layer": model.block_layer - model.config.layers,
        "clip_digest": model.clip_digest,
        "total_training_images": total_images,
        "class_token": settings.tokens == "cls",
    }


_NOT_RECIPE = {
    "root_dir", "ray_address", "overwrite", "backbone", "device", "total_training_tokens", "run_name", "max_bad_fraction",
}  # fmt: skip


def _checkpoint_names(settings: TrainSettings, total_images: int) -> list[str]:
    """File names of the checkpoints on the way: sae_{images}_images.pt."""
    steps = checkpoint_steps(settings.n_checkpoints, math.ceil(total_images / settings.batch_size))
    return [f"sae_{step * settings.batch_size}_images.pt" for step in steps]


def _identity(
    settings: TrainSettings, model: LoadedModel, manifest: Manifest, precision: str, total_images: int
) -> dict[str, Any]:
    recipe = {
        key: value
        for key, value in as_dict(settings).items()
        if key in TrainSettings.__annotations__ and key not in {"run_name", "total_training_tokens", "total_training_images"}
    }
    return {
        **model.identity(precision),
        "manifest": manifest.digest,
        "total_images": total_images,
        **recipe,
    }


def log_summary(metrics: dict[str, float], uri: str) -> None:
    """The last lines of the job."""
    log.info(
        "train: %s images in %.1f s (%.1f images/s), loss %.5f, mse %.5f, L0 %.1f, dead latents %.1f %%",
        f"{metrics['images']:,.0f}", metrics["wall_seconds"], metrics["images_per_second"], metrics["loss"],
        metrics["mse_loss"], metrics["l0"], 100 * metrics["dead_share"],
    )  # fmt: skip
    log.info("train: checkpoint %s", storage.join(uri, "sae.pt"))
