"""Training an autoencoder: settings → a run that workers can join, and what came of it → checkpoint files."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from patchsae_ray import storage
from patchsae_ray.backbone.weights import state_digest
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.chunks import ORDER_VERSION, Drawing, LaneOrder, num_lanes
from patchsae_ray.data.grains import Grain, RowGroups, SingleImages
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import UNIT_SIZE, Manifest
from patchsae_ray.data.mixed import OrderMixing, order_mixing
from patchsae_ray.errors import UserError
from patchsae_ray.figures_train import density_figure, mixing_figure
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.cached import cached_tokens, open_cache
from patchsae_ray.pipelines.heartbeat import check_nobody_works
from patchsae_ray.pipelines.manifests import ManifestTasks
from patchsae_ray.pipelines.model import LoadedModel, load_model
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.resume import ResumeFolder, Saved
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet
from patchsae_ray.pipelines.train_claim import sole_driver
from patchsae_ray.pipelines.train_launch import TrainJob, launch
from patchsae_ray.pipelines.train_listener import TrainListener
from patchsae_ray.pipelines.train_plan import TrainPlan, plan_training
from patchsae_ray.pipelines.train_worker import TrainRun
from patchsae_ray.sae.checkpoint import safetensors_bytes, torch_bytes
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.window import LOG_DENSITY_EDGES
from patchsae_ray.settings import TrainSettings, as_dict

log = logging.getLogger(__name__)

PATCHSAE_TOTAL_IMAGES = 2_621_440
SAE_FILE, SAFE_FILE, MIXING_FILE, DENSITY_FILE = "sae.pt", "sae.safetensors", "batch_mixing.png", "latent_density.png"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def train(settings: TrainSettings) -> dict[str, float]:
    """`jobs/train.py`: write sae.pt and sae.safetensors. Returns the summary's numbers.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    model = load_model(settings)
    manifest = open_dataset(
        settings.dataset_name, settings.dataset_path, settings.split, None, settings.root_dir, settings.relist,
        ManifestTasks(settings.ray_address, settings.root_dir),
    )  # fmt: skip
    order = order_of(settings, model, manifest)
    uri = checkpoint_folder(settings, model, manifest, order)
    names = [SAE_FILE, SAFE_FILE, MIXING_FILE, DENSITY_FILE, ERRORS_FILE, *_extra_files(settings, order).values()]
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = identity_of(settings, model, manifest, precision, order)
        outputs = dict.fromkeys(names, run_key(identity))
        folders[precision] = ResultFolder(uri, "train", identity, outputs, elsewhere="--run_name")

    def work(session: Session) -> Made:
        return run_training(settings, model, manifest, order, session)

    def join(settings: TrainSettings) -> TrainPlan:
        if settings.activations is not None:
            open_cache(settings, model, manifest)  # one that does not fit is refused before anything is begun
        return plan_training(settings)

    summary = run_once(settings, folders, work, join=join, repeats=True)
    log_summary(summary, uri)
    return summary


def run_training(settings: TrainSettings, model: LoadedModel, manifest: Manifest, order: LaneOrder, session: Session) -> Made:
    """Train from where the run stands, and read what came of it.

    Raises: UserError past `--max_bad_fraction`, for a checkpoint of other settings, or where the run cannot go on.
    """
    plan, folder = session.plan, session.folder
    assert isinstance(plan, TrainPlan)
    if plan.num_workers > order.lanes:
        raise UserError(
            f"--num_workers {plan.num_workers}: the tokens of this run come in {order.lanes} lanes, and a worker needs one; a "
            "larger --buffer_tokens or a smaller --clip_batch_size would make more"
        )
    resume = ResumeFolder(storage.absolute(storage.join(folder.uri, "resume")), folder.key, folder.identity)
    if settings.overwrite:
        check_nobody_works(resume.uri)
    else:
        resume.check()
    session.held.enter_context(sole_driver(resume.own, lambda: not settings.overwrite and folder.done_meanwhile()))
    if settings.overwrite:
        resume.clear()
    return _train(settings, model, keep(manifest), order, session, resume)


def _train(
    settings: TrainSettings, model: LoadedModel, manifest: Manifest, order: LaneOrder, session: Session, resume: ResumeFolder
) -> Made:
    plan, folder = session.plan, session.folder
    assert isinstance(plan, TrainPlan)
    mixing = order_mixing(order, labels_of(manifest))
    _log_plan(settings, model, manifest, order, mixing)
    config, extra = checkpoint_config(settings, model, order), _extra_files(settings, order)

    def written(step: int) -> None:
        saved = resume.read(step, "weights")
        if saved is not None:
            folder.write(extra[step], torch_bytes(_sae(saved.tensors), config))

    listener = TrainListener(order, session.tracker, manifest, settings.max_bad_fraction, resume, written)
    job = _job(settings, model, manifest, order, resume, plan)
    launch(job, settings.max_bad_fraction, settings.no_progress_minutes, listener)
    state = resume.read(order.steps)
    if state is None:
        raise UserError(f"{resume.own}: the last checkpoint is not whole; the same command goes on from the one before")
    for step in set(extra) - listener.weights:
        written(step)
    return _made(order, manifest, config, state, listener, mixing, resume)


def _log_plan(settings: TrainSettings, model: LoadedModel, manifest: Manifest, order: LaneOrder, mixing: OrderMixing) -> None:
    images, latents = images_of(order, order.steps), model.config.width * settings.expansion_factor
    log.info(
        "train: %s images in %s steps of %s tokens, %s latents; a batch has tokens of %s",
        f"{images:,.0f}", f"{order.steps:,}", f"{_batch_tokens(order):,}", f"{latents:,}", describe(mixing),
    )  # fmt: skip
    if isinstance(order.grain, RowGroups):
        log.info(
            "train: row groups of %s can only be read whole, and %d of them are mixed; jobs/cache_activations.py, and "
            "--activations with its folder, would mix single images", manifest.source, order.lanes,
        )  # fmt: skip
    if isinstance(order.grain, RowGroups) and manifest.largest_group > 2 * UNIT_SIZE:
        log.info(
            "train: row groups of up to %s rows are read once for each %d rows that are trained on; row groups of up to %s "
            "rows, or cached activations, would be read once", f"{manifest.largest_group:,}", UNIT_SIZE, f"{2 * UNIT_SIZE:,}",
        )  # fmt: skip


def _made(
    order: LaneOrder,
    manifest: Manifest,
    config: dict[str, Any],
    state: Saved,
    listener: TrainListener,
    mixing: OrderMixing,
    resume: ResumeFolder,
) -> Made:
    sae = _sae(state.tensors)
    summary = {**state.notes["metrics"], **listener.summary(), **mixing.as_metrics()}
    files = {
        SAE_FILE: torch_bytes(sae, config),
        SAFE_FILE: safetensors_bytes(sae, config),
        MIXING_FILE: mixing_figure(mixing, _batch_tokens(order)),
        DENSITY_FILE: density_figure(state.notes["latent_density"]),
        ERRORS_FILE: errors_parquet(listener.kept.bad),
    }
    record = {
        "source": manifest.source,
        "resumed_from_step": listener.resumed_from,
        "latent_density": {"log10_edges": LOG_DENSITY_EDGES.tolist(), "never_and_counts": state.notes["latent_density"]},
        **listener.kept.record(),
    }
    made = {"sae": state_digest(sae.state_dict())}
    return Made(files, summary, summary, record, step=order.steps, tags=made, spent=resume.own)


def _sae(state: dict[str, Tensor]) -> SparseAutoencoder:
    return SparseAutoencoder.from_tensors({name: state[name] for name in _WEIGHTS})


def _job(
    settings: TrainSettings, model: LoadedModel, manifest: Manifest, order: LaneOrder, resume: ResumeFolder, plan: TrainPlan
) -> TrainJob:
    cls_place = None if settings.tokens == "patch" else 0
    extra = tuple(_extra_files(settings, order))
    run = TrainRun(settings, order, model.config.width, cls_place, resume, plan.precision, extra, labels_of(manifest))
    cache = open_cache(settings, model, manifest) if plan.source == "cached" else None
    which = cached_tokens(cache.record, settings, model) if cache is not None else slice(None)
    return TrainJob(
        run, plan, _portable(manifest, settings.root_dir, plan), model.config.image_size, model.portable(plan.precision),
        settings.tokens, settings.activation_dtype, settings.clip_batch_size, cache, which,
    )  # fmt: skip


def _portable(manifest: Manifest, root_dir: str, plan: TrainPlan) -> Manifest:
    """The manifest without its file, for workers that may not see this machine's files."""
    unseen = plan.on_ray and storage.is_local(root_dir) and cluster.several_machines()
    return replace(manifest, units=manifest.units.in_memory()) if unseen else manifest


def order_of(settings: TrainSettings, model: LoadedModel, manifest: Manifest) -> LaneOrder:
    """The order of a run: of the settings, the model's tokens and the data set's size, and of nothing else."""
    t = model.tokens_per_image(settings.tokens)
    drawing = Drawing(settings.batching, t, settings.token_share, settings.batch_size)
    if settings.batching == "tokens":
        drawing = replace(drawing, batch_size=settings.batch_tokens or settings.batch_size * drawing.kept_tokens)
    tokens = settings.total_training_tokens
    if tokens is None:
        tokens = (settings.total_training_images or PATCHSAE_TOTAL_IMAGES) * drawing.kept_tokens
    total = -(-tokens // drawing.draw_tokens)
    grain = grain_of(settings, manifest)
    return LaneOrder(grain, drawing, num_lanes(settings.buffer_tokens, grain, drawing, total), settings.seed, total)


def grain_of(settings: TrainSettings, manifest: Manifest) -> Grain:
    """What is read at a time: cached activations are single images whatever the data set's own files are."""
    if settings.activations is None and manifest.grain == "group":
        return RowGroups(manifest.group_edges())
    return SingleImages(manifest.num_images, settings.clip_batch_size)


def labels_of(manifest: Manifest) -> np.ndarray | None:
    """[num_images] int32 labels, None where no image has one."""
    return manifest.label_array() if manifest.labelled else None


def _batch_tokens(order: LaneOrder) -> int:
    return order.drawing.batch_size * order.drawing.draw_tokens


def images_of(order: LaneOrder, step: int) -> float:
    """Images whose tokens `step` steps are, repeats counted."""
    return min(step * order.drawing.batch_size, order.total) * order.drawing.draw_tokens / order.drawing.kept_tokens


def describe(mixing: OrderMixing) -> str:
    """`4,001 images (at random: 4,012) of 975 classes (at random: 976)`."""
    here, random = mixing.batch, mixing.batch_at_random
    said = f"{here.images:,.0f} images (at random: {random.images:,.0f})"
    if here.classes is None or random.classes is None:
        return said
    return f"{said} of {here.classes:,.0f} classes (at random: {random.classes:,.0f})"


def checkpoint_folder(settings: TrainSettings, model: LoadedModel, manifest: Manifest, order: LaneOrder) -> str:
    """{root_dir}/out/checkpoints/{run_name}; where none is given, a name made of the settings with a digest of them all."""
    everything = run_key(identity_of(settings, model, manifest, settings.precision, order))
    backbone = model.config.name.rsplit("/", 1)[-1].removesuffix(".json")
    made = (
        f"{settings.dataset_name}_{backbone}_block{model.block_layer}_{settings.tokens}_x{settings.expansion_factor}"
        f"_l1{settings.l1_coefficient:g}_lr{settings.lr:g}_{images_of(order, order.steps):.0f}images"
        f"_seed{settings.seed}_{everything[:6]}"
    )
    return storage.join(settings.root_dir, "out", "checkpoints", settings.run_name or made)


def checkpoint_config(settings: TrainSettings, model: LoadedModel, order: LaneOrder) -> dict[str, Any]:
    """The cfg of the checkpoint: what the released code looks up, what `--backbone` may be left out for, and the recipe."""
    recipe = {key: value for key, value in as_dict(settings).items() if key not in _NOT_RECIPE}
    return {
        **recipe,
        "model_name": model.config.name,
        "block_layer": model.block_layer - model.config.layers,
        "clip_digest": model.clip_digest,
        "total_training_images": round(images_of(order, order.steps)),
        "class_token": settings.tokens == "cls",
    }


_PLACEMENT = {
    "source", "activations", "num_workers", "accumulate", "checkpoint_steps", "checkpoint_minutes", "run_name",
}  # fmt: skip
"""Settings of training that say where and how, and not what."""
_NOT_RECIPE = _PLACEMENT | {
    "root_dir", "ray_address", "overwrite", "relist", "backbone", "device", "total_training_tokens", "max_bad_fraction",
    "workers", "num_gpus", "decode_cpus", "no_progress_minutes",
}  # fmt: skip


def _extra_files(settings: TrainSettings, order: LaneOrder) -> dict[int, str]:
    """Step → file name of each checkpoint on the way: sae_{images}_images.pt."""
    steps = extra_steps(settings.n_checkpoints, order.steps)
    return {step: f"sae_{images_of(order, step):.0f}_images.pt" for step in steps}


def extra_steps(n_checkpoints: int, total_steps: int) -> tuple[int, ...]:
    """After which steps the weights are kept too: evenly spaced, never the last."""
    steps = {round(total_steps * (index + 1) / (n_checkpoints + 1)) for index in range(n_checkpoints)}
    return tuple(sorted(step for step in steps if 0 < step < total_steps))


def identity_of(
    settings: TrainSettings, model: LoadedModel, manifest: Manifest, precision: str, order: LaneOrder
) -> dict[str, Any]:
    """What the trained weights depend on."""
    lengths = {"total_training_tokens", "total_training_images", "batch_size", "batch_tokens"}
    recipe = {key: value for key, value in as_dict(settings).items() if key in TrainSettings.__annotations__}
    return {
        **model.identity(precision),
        "manifest": manifest.digest,
        "total_draws": order.total,
        "batch_draws": order.drawing.batch_size,
        "order": ORDER_VERSION,
        "grain": order.grain.describe(),
        **{key: value for key, value in recipe.items() if key not in _PLACEMENT | lengths},
    }


def log_summary(metrics: dict[str, float], uri: str) -> None:
    """The last lines of the job."""
    log.info(
        "train: %s images in %.1f s (%.1f images/s), loss %.5f, mse %.5f, L0 %.1f, explained variance %.2f %%, dead %.1f %%",
        f"{metrics['images']:,.0f}", metrics["wall_seconds"], metrics["images_per_second"], metrics["loss"],
        metrics["mse_loss"], metrics["l0"], 100 * metrics["explained_variance"], 100 * metrics["dead_share"],
    )  # fmt: skip
    log.info("train: checkpoint %s", storage.join(uri, SAE_FILE))
