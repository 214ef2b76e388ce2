"""Training an autoencoder: settings → a run that workers can join, and what came of it → checkpoint files."""

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from patchsae_ray import storage
from patchsae_ray.backbone.weights import state_digest
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.chunks import ChunkTable, Drawing, LaneOrder, num_lanes
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.mixing import distinct_images, expected_distinct_images
from patchsae_ray.errors import UserError
from patchsae_ray.figures_train import density_figure, mixing_figure
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.cached import cached_tokens, open_cache
from patchsae_ray.pipelines.model import LoadedModel, load_model
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.resume import ResumeFolder, Saved
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet
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
MIXING_STEPS = 20
"""Batches whose images are counted for the figure."""
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def train(settings: TrainSettings) -> dict[str, float]:
    """`jobs/train.py`: write sae.pt and sae.safetensors. Returns the summary's numbers.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    model = load_model(settings)
    manifest = open_dataset(
        settings.dataset_name, settings.dataset_path, settings.split, None, settings.root_dir, settings.relist
    )
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

    summary = run_once(settings, folders, work, join=plan_training, anew=settings.overwrite)
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
        resume.clear()
    resume.check()
    job = _job(settings, model, keep(manifest), order, resume, plan)
    log.info(
        "train: %s images in %s steps of %s tokens, %s latents; a batch has tokens of %.0f images (at random: %.0f)",
        f"{images_of(order, order.steps):,.0f}", f"{order.steps:,}", f"{_batch_tokens(order):,}",
        f"{model.config.width * settings.expansion_factor:,}", *_mixing(order, manifest)[:2],
    )  # fmt: skip
    config = checkpoint_config(settings, model, order)
    extra = _extra_files(settings, order)

    def written(step: int) -> None:
        saved = resume.read(step, "weights")
        if saved is not None:
            folder.write(extra[step], torch_bytes(_sae(saved.tensors), config))

    listener = TrainListener(order, session.tracker, manifest, settings.max_bad_fraction, resume, written)
    launch(job, settings.max_bad_fraction, settings.no_progress_minutes, listener)
    state = resume.read(order.steps)
    if state is None:
        raise UserError(f"{resume.own}: the last checkpoint is not whole; the same command goes on from the one before")
    for step in set(extra) - listener.weights:
        written(step)
    return _made(settings, order, manifest, config, state, listener, resume)


def _made(
    settings: TrainSettings,
    order: LaneOrder,
    manifest: Manifest,
    config: dict[str, Any],
    state: Saved,
    listener: TrainListener,
    resume: ResumeFolder,
) -> Made:
    sae = _sae(state.tensors)
    mixed, ideal, whole = _mixing(order, manifest)
    mixing = {"distinct_images": mixed, "distinct_images_ideal": ideal, "distinct_images_whole": whole}
    summary = {**state.notes["metrics"], **listener.summary(), **mixing}
    files = {
        SAE_FILE: torch_bytes(sae, config),
        SAFE_FILE: safetensors_bytes(sae, config),
        MIXING_FILE: mixing_figure(mixed, ideal, whole, _batch_tokens(order)),
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
    return Made(files, summary, summary, record, step=order.steps, tags=made, spent=resume.uri)


def _sae(state: dict[str, Tensor]) -> SparseAutoencoder:
    return SparseAutoencoder.from_tensors({name: state[name] for name in _WEIGHTS})


def _job(
    settings: TrainSettings, model: LoadedModel, manifest: Manifest, order: LaneOrder, resume: ResumeFolder, plan: TrainPlan
) -> TrainJob:
    cls_place = None if settings.tokens == "patch" else 0
    extra = tuple(_extra_files(settings, order))
    run = TrainRun(settings, order, model.config.width, cls_place, resume, plan.precision, extra)
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
    table = ChunkTable(manifest.units.edges(), settings.clip_batch_size)
    drawing = Drawing(settings.batching, t, settings.token_share, settings.batch_size)
    if settings.batching == "tokens":
        drawing = replace(drawing, batch_size=settings.batch_tokens or settings.batch_size * drawing.kept_tokens)
    tokens = settings.total_training_tokens
    if tokens is None:
        tokens = (settings.total_training_images or PATCHSAE_TOTAL_IMAGES) * drawing.kept_tokens
    total = -(-tokens // drawing.draw_tokens)
    lanes = num_lanes(settings.buffer_tokens, settings.clip_batch_size, len(table), drawing, total)
    return LaneOrder(table, drawing, lanes, settings.seed, total)


def _batch_tokens(order: LaneOrder) -> int:
    return order.drawing.batch_size * order.drawing.draw_tokens


def images_of(order: LaneOrder, step: int) -> float:
    """Images whose tokens `step` steps are, repeats counted."""
    return min(step * order.drawing.batch_size, order.total) * order.drawing.draw_tokens / order.drawing.kept_tokens


def _mixing(order: LaneOrder, manifest: Manifest) -> tuple[float, float, float]:
    """Distinct images of a batch: by this run's order, of tokens drawn from the whole data set, of whole images."""
    kept, batch = order.drawing.kept_tokens, min(_batch_tokens(order), order.total * order.drawing.draw_tokens)
    counted = distinct_images(order, MIXING_STEPS)
    whole = counted[:-1] if len(counted) == order.steps > 1 else counted  # the last batch may be smaller
    ideal = expected_distinct_images(manifest.num_images, kept, min(batch, manifest.num_images * kept))
    return float(whole.mean()), ideal, min(float(manifest.num_images), max(1.0, batch / kept))


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
