"""What each latent responds to, and counts a class, in one pass."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from patchsae_ray import figures, storage
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.measure.extraction import ExtractionSettings, ExtractionTotals
from patchsae_ray.measure.latents import MAX_POSITIONS, LatentResult
from patchsae_ray.measure.quality import QualityResult
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.extract_worker import ExtractTask
from patchsae_ray.pipelines.model import Inputs, read_inputs
from patchsae_ray.pipelines.passes import Pass, UnitPass
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet, npy_bytes, tensor_bytes
from patchsae_ray.settings import ClassLatentsSettings, ExtractSettings

log = logging.getLogger(__name__)

COUNTS_FILE = "cls_sae_cnt.npy"
TOP_LABELS_FILE = "max_activating_image_label_indices.pt"
QUALITY_FILE = "quality.json"
FIGURE_FILE = "top_images.png"
HISTOGRAM_FILE = "sae_activation_histogram.npy"


@dataclass(frozen=True)
class LatentPass:
    """A finished pass over the latents."""

    latents: LatentResult
    quality: QualityResult | None
    record: Pass


def feature_folder(settings: ClassLatentsSettings) -> str:
    """{root_dir}/out/feature_data/{vit_type}/{dataset_name}."""
    return storage.join(settings.root_dir, "out", "feature_data", settings.vit_type, settings.dataset_name)


def counts_identity(settings: ClassLatentsSettings, inputs: Inputs, precision: str) -> dict[str, Any]:
    """What the class counts depend on."""
    return {
        **inputs.model.identity(precision),
        "manifest": inputs.manifest.digest,
        "classnames": list(inputs.manifest.classnames),
        "tokens": settings.tokens,
        "threshold": ",".join(f"{value:g}" for value in settings.thresholds()),
    }


def run_pass(
    what: str,
    settings: ClassLatentsSettings,
    inputs: Inputs,
    session: Session,
    top_k: int,
    quality_images: int = 0,
    seed: int = 0,
) -> LatentPass:
    """One pass over the images on Ray, committed unit by unit.

    Raises: UserError past `--max_bad_fraction`, where a label has no class, or where the pass cannot go on.
    """
    model, manifest, plan = inputs.model, inputs.manifest, session.plan
    if manifest.num_images > MAX_POSITIONS:
        raise UserError(f"{manifest.source} has {manifest.num_images:,} images; {MAX_POSITIONS:,} can be told apart")
    sample = sample_positions(manifest.num_images, quality_images, seed)
    measured = ExtractionSettings(settings.tokens, settings.thresholds(), top_k, sample)
    key = bundle_key(session, measured)
    task = ExtractTask(model.portable(plan.precision), measured, settings.batch_size)
    totals, kept = UnitPass(
        what, manifest, model.config.image_size, task, ExtractionTotals, session, key,
        settings.max_bad_fraction, settings.no_progress_minutes, settings.commit_seconds,
    ).run()  # fmt: skip
    if totals.statistics is None or totals.quality is None:
        raise UserError(f"{manifest.source}: every unit was given up, so there is nothing to write")
    highest = max(totals.statistics.class_counts, default=-1)
    if highest >= manifest.num_classes:
        raise UserError(f"{manifest.source} has the label {highest}, but {manifest.num_classes} class names")
    return LatentPass(totals.statistics.result(manifest.num_classes), totals.quality.result(), kept)


def bundle_key(session: Session, measured: ExtractionSettings) -> str:
    """The run key of the bundles: of all that a unit's statistics depend on, and not of the figure."""
    identity = {key: value for key, value in session.folder.identity.items() if key not in {"figure_latents", "seed"}}
    sample = measured.quality_positions
    return run_key({**identity, "top_k": measured.top_k, "quality_sample": storage.digest([np.ascontiguousarray(sample)])})


def sample_positions(num_images: int, wanted: int, seed: int) -> np.ndarray:
    """Sorted positions of a sample without repeats; all of them where no more are there."""
    if wanted >= num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(seed).choice(num_images, wanted, replace=False))


def extract(settings: ExtractSettings) -> dict[str, float]:
    """`jobs/extract.py`: write the guide's feature files. Returns the summary's numbers.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    inputs = read_inputs(settings)
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = {
            **counts_identity(settings, inputs, precision),
            "top_k": settings.top_k,
            "quality_images": settings.quality_images,
            "seed": settings.seed,
            "figure_latents": settings.figure_latents,
        }
        outputs = _outputs(settings, inputs, identity)
        folders[precision] = ResultFolder(feature_folder(settings), "extract", identity, outputs)

    def work(session: Session) -> Made:
        found = run_pass("extract", settings, inputs, session, settings.top_k, settings.quality_images, settings.seed)
        return _made(found, inputs.manifest, _files(settings, found, inputs))

    return _run(settings, folders, work)


def class_latents(settings: ClassLatentsSettings) -> dict[str, float]:
    """`jobs/class_latents.py`: write cls_sae_cnt.npy; instant where a pass with the same settings has done it.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    inputs = read_inputs(settings)
    if not inputs.manifest.labelled:
        raise UserError(f"{inputs.manifest.source} has no labels, so there are no classes to count by")
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = counts_identity(settings, inputs, precision)
        outputs = {**_counts_outputs(settings, identity), ERRORS_FILE: _numbers_key(identity)}
        folders[precision] = ResultFolder(feature_folder(settings), "class_latents", identity, outputs)

    def work(session: Session) -> Made:
        found = run_pass("class_latents", settings, inputs, session, top_k=1)
        files = {**_counts_files(settings, found.latents), ERRORS_FILE: errors_parquet(found.record.bad)}
        return _made(found, inputs.manifest, files)

    return _run(settings, folders, work)


def _run(settings: ClassLatentsSettings, folders: dict[str, ResultFolder], work: Callable[[Session], Made]) -> dict[str, float]:
    summary = run_once(settings, folders, work)
    folder = next(iter(folders.values()))
    log_summary(folder.job, summary, folder.uri)
    return summary


def _made(found: LatentPass, manifest: Manifest, files: dict[str, bytes]) -> Made:
    metrics = latent_metrics(found)
    seconds = {f"seconds_{stage}": value for stage, value in found.record.seconds().items()}
    record = {"source": manifest.source, "ignored_files": manifest.ignored_files, **found.record.record()}
    return Made(files, metrics, {**metrics, **seconds}, record, spent=found.record.bundles)


_EXTRACT_ONLY = {"top_k", "quality_images", "seed", "figure_latents"}
_TOP_FILES = ("max_activating_image_indices.pt", "max_activating_image_values.pt")
_MEAN_FILES = ("sae_mean_acts.pt", "sae_sparsity.pt")


def _numbers_key(identity: dict[str, Any]) -> str:
    """The key of what depends on the images, the model and the tokens alone."""
    return run_key({key: value for key, value in identity.items() if key not in {*_EXTRACT_ONLY, "threshold"}})


def counts_file(index: int, threshold: float) -> str:
    """cls_sae_cnt.npy for the first threshold, cls_sae_cnt_0.5.npy for another."""
    return COUNTS_FILE if index == 0 else f"{COUNTS_FILE.removesuffix('.npy')}_{threshold:g}.npy"


def _counts_outputs(settings: ClassLatentsSettings, identity: dict[str, Any]) -> dict[str, str]:
    base = {key: value for key, value in identity.items() if key not in _EXTRACT_ONLY}
    thresholds = enumerate(settings.thresholds())
    return {counts_file(index, threshold): run_key({**base, "threshold": threshold}) for index, threshold in thresholds}


def _counts_files(settings: ClassLatentsSettings, latents: LatentResult) -> dict[str, bytes]:
    thresholds = enumerate(settings.thresholds())
    return {counts_file(index, threshold): npy_bytes(latents.class_counts[index]) for index, threshold in thresholds}


def _outputs(settings: ExtractSettings, inputs: Inputs, identity: dict[str, Any]) -> dict[str, str]:
    """File → the key of just what it depends on, so that another figure or sample leaves the numbers valid."""
    numbers = _numbers_key(identity)
    tops = run_key({"numbers": numbers, "top_k": settings.top_k})
    by_type = [name.replace(".pt", f"_{kind}.pt") for kind in inputs.model.token_types(settings.tokens) for name in _MEAN_FILES]
    outputs = {**dict.fromkeys(_TOP_FILES, tops), **dict.fromkeys((*_MEAN_FILES, *by_type, HISTOGRAM_FILE), numbers)}
    if inputs.manifest.labelled:
        outputs[TOP_LABELS_FILE] = tops
        outputs.update(_counts_outputs(settings, identity))
    if settings.figure_latents:
        outputs[FIGURE_FILE] = run_key({"top": tops, "figure_latents": settings.figure_latents})
    if settings.quality_images:
        outputs[QUALITY_FILE] = run_key({"numbers": numbers, "quality_images": settings.quality_images, "seed": settings.seed})
    return {**outputs, ERRORS_FILE: numbers}


def _files(settings: ExtractSettings, found: LatentPass, inputs: Inputs) -> dict[str, bytes]:
    latents, top, manifest = found.latents, found.latents.top, inputs.manifest
    contents = (top.positions, top.values, latents.mean_acts, latents.sparsity)
    files = {name: tensor_bytes(tensor) for name, tensor in zip((*_TOP_FILES, *_MEAN_FILES), contents, strict=True)}
    for kind, *tensors in zip(
        inputs.model.token_types(settings.tokens), latents.mean_acts_by_type, latents.sparsity_by_type, strict=True
    ):
        for name, tensor in zip(_MEAN_FILES, tensors, strict=True):
            files[name.replace(".pt", f"_{kind}.pt")] = tensor_bytes(tensor.clone())
    files[HISTOGRAM_FILE] = npy_bytes(latents.histogram)
    files[ERRORS_FILE] = errors_parquet(found.record.bad)
    if manifest.labelled:
        files[TOP_LABELS_FILE] = tensor_bytes(top.labels.to(torch.int64))
        files.update(_counts_files(settings, latents))
    if settings.figure_latents:
        files[FIGURE_FILE] = figures.top_images(latents, manifest, settings.figure_latents)
    if settings.quality_images:
        quality = asdict(found.quality) if found.quality else {}
        files[QUALITY_FILE] = (json.dumps(quality, indent=1) + "\n").encode()
    return files


def latent_metrics(found: LatentPass) -> dict[str, float]:
    """Numbers with stable names: what MLflow gets and the summary prints."""
    active = found.latents.sparsity > 0
    wall = found.record.wall_seconds()
    metrics = {
        "images": float(found.latents.num_images),
        "bad_images": float(len(found.record.bad)),
        "latents": float(len(active)),
        "dead_latents": float((~active).sum()),
        "dead_share": float((~active).float().mean()),
        "images_per_second": found.record.images_per_second(),
        "wall_seconds": wall,
    }
    if found.quality is not None:
        metrics.update({f"quality_{name}": float(value) for name, value in asdict(found.quality).items()})
    return metrics


def log_summary(what: str, metrics: dict[str, float], folder: str) -> None:
    """The last lines of a job."""
    log.info(
        "%s: %s images in %.1f s, %s of %s latents never active, %s unreadable images",
        what, f"{metrics['images']:,.0f}", metrics["wall_seconds"], f"{metrics['dead_latents']:,.0f}",
        f"{metrics['latents']:,.0f}", f"{metrics['bad_images']:,.0f}",
    )  # fmt: skip
    if "quality_l0" in metrics:
        log.info(
            "%s: explained variance %.4f, L0 %.1f, on %s sampled images",
            what, metrics["quality_explained_variance"], metrics["quality_l0"], f"{metrics['quality_num_images']:,.0f}",
        )  # fmt: skip
    log.info("%s: results in %s", what, folder)
