"""Zero-shot classification with only the k first latents, and without them, for every k in one pass."""

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from patchsae_ray import figures, storage
from patchsae_ray.backbone.zero_shot import OPENAI_IMAGENET_TEMPLATES
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError, nearest
from patchsae_ray.measure.masking import MaskingAccuracy, settings_of
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.model import Inputs, LoadedModel, read_inputs
from patchsae_ray.pipelines.passes import Pass, UnitPass
from patchsae_ray.pipelines.results import ResultFolder, record_of_file, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.steer_worker import SteerTask, SteerTotals, classifier_rows
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet
from patchsae_ray.settings import SteerSettings

log = logging.getLogger(__name__)

RANKINGS = ("class", "random")
CURVE_FILE = "masking_curve.png"


def parse_topk(text: str, num_latents: int) -> list[int]:
    """`1,2,all` → ascending numbers of latents; `all` is the width. Of the default list, those above the width are dropped.

    Raises: UserError for what is no number, 0, or above the width.
    """
    default = text == SteerSettings.topk
    ks: set[int] = set()
    for part in (piece.strip() for piece in text.split(",")):
        if part == "all":
            ks.add(num_latents)
            continue
        if not part.isdecimal() or int(part) == 0:
            raise UserError(f"--topk {part!r}: numbers of latents from 1, or all, separated by commas")
        if int(part) <= num_latents:
            ks.add(int(part))
        elif not default:
            raise UserError(f"--topk {part}: the SAE has {num_latents} latents")
    return sorted(ks)


def parse_rankings(text: str) -> list[str]:
    """`class,random` → the rankings, each once, in order.

    Raises: UserError for an unknown one.
    """
    rankings = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for ranking in rankings:
        if ranking not in RANKINGS:
            raise UserError(f"--rank_by {ranking!r}: {', '.join(RANKINGS)} are known{nearest(ranking, RANKINGS)}")
    return rankings


def read_counts(settings: SteerSettings, model: LoadedModel, manifest: Manifest) -> np.ndarray:
    """cls_sae_cnt.npy as [s, c], in either orientation, checked against the SAE and the class list.

    Raises: UserError where it is no such matrix, or by its run.json of another SAE or class list.
    """
    path = settings.cls_wise_sae_activation_path
    try:
        counts = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a whole .npy array of numbers") from error
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iuf":
        raise UserError(f"{path} is not a .npy array of numbers")
    s, c = model.autoencoder.d_sae, manifest.num_classes
    record = record_of_file(path)
    if record is not None:
        _check_made_for(path, record["identity"], model, manifest)
    fits = {"latents_first": counts.shape == (s, c), "classes_first": counts.shape == (c, s)}
    chosen = settings.counts_orientation
    if chosen == "auto":
        if all(fits.values()) and record is None:
            raise UserError(f"{path} is square ({s} by {c}): say which axis is which with --counts_orientation")
        chosen = "latents_first" if fits["latents_first"] else "classes_first"
    if not fits[chosen]:
        raise UserError(f"{path} has shape {counts.shape}; {(s, c)} for this SAE and these {c} classes would be right")
    log.info("steer: class counts read from %s, %s", path, chosen)
    return counts if chosen == "latents_first" else counts.T


def _check_made_for(path: str, made: dict[str, Any], model: LoadedModel, manifest: Manifest) -> None:
    checkpoint = model.checkpoint
    if checkpoint is not None and made.get("sae") != checkpoint.digest:
        raise UserError(f"{path} was counted with another SAE (by the run.json beside it) than --sae_path {checkpoint.path}")
    theirs, ours = made.get("classnames"), list(manifest.classnames)
    if theirs and theirs != ours:
        raise UserError(f"{path} was counted for another class list (by the run.json beside it) than {manifest.source} has")


@dataclass(frozen=True)
class SteerInputs(Inputs):
    """What a steering run is about, read and checked."""

    counts: np.ndarray
    """[s, c]."""
    ks: list[int]
    rankings: list[str]


def read_steer_inputs(settings: SteerSettings) -> SteerInputs:
    """Everything that steering needs.

    Raises: UserError for whatever is wrong with it.
    """
    inputs = read_inputs(settings, text=True)
    model, manifest = inputs.model, inputs.manifest
    if not manifest.labelled:
        raise UserError(f"{manifest.source} has no labels: steering is measured on labelled images")
    if not manifest.classnames:
        raise UserError(f"{manifest.source} names no classes: --classnames FILE is needed for the zero-shot classifier")
    ks, rankings = parse_topk(settings.topk, model.autoencoder.d_sae), parse_rankings(settings.rank_by)
    return SteerInputs(model, manifest, read_counts(settings, model, manifest), ks, rankings)


def steer(settings: SteerSettings) -> dict[str, Any]:
    """`jobs/steer.py`: write metrics.csv. Returns {"no_sae": percent, ranking: {"on": […], "off": […]}, "ks": […]}.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    inputs = read_steer_inputs(settings)
    uri = storage.join(settings.root_dir, "eval_outputs", settings.vit_type, settings.dataset_name)
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = _identity(settings, inputs, precision)
        names = [*_metric_files(inputs.rankings).values(), CURVE_FILE, ERRORS_FILE]
        folders[precision] = ResultFolder(uri, "steer", identity, dict.fromkeys(names, run_key(identity)))

    def work(session: Session) -> Made:
        accuracy, kept = run_steering(settings, inputs, session)
        curves = _curves(accuracy, inputs.ks)
        counts_from = record_of_file(settings.cls_wise_sae_activation_path)
        made_by = {"counts_run_key": counts_from["run_key"] if counts_from else None}
        record = {"source": inputs.manifest.source, **kept.record()}
        files, metrics = _files(inputs, accuracy, curves, kept), _metrics(curves, kept)
        return Made(files, curves, metrics, record, tags=made_by, spent=storage.join(uri, "bundles", session.folder.key))

    curves = run_once(settings, folders, work)
    whole = curves[inputs.rankings[0]]["on"][-1] if inputs.ks[-1] == inputs.model.autoencoder.d_sae else None
    log.info("steer: zero-shot accuracy without the SAE %.2f %%", curves["no_sae"])
    if whole is not None:
        log.info("steer: zero-shot accuracy with its whole reconstruction %.2f %%", whole)
    log.info("steer: results in %s", uri)
    return curves


def run_steering(settings: SteerSettings, inputs: SteerInputs, session: Session) -> tuple[dict[str, MaskingAccuracy], Pass]:
    """The pass on Ray: right predictions a ranking, and what was kept of the pass.

    Raises: UserError past `--max_bad_fraction`, or where the pass cannot go on.
    """
    manifest, plan = inputs.manifest, session.plan
    prompts = len(OPENAI_IMAGENET_TEMPLATES) * len(manifest.classnames)
    log.info("steer: classifier from %s prompts", f"{prompts:,}")
    remote = ray.remote(classifier_rows).options(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus)
    weights = {name: value.numpy() for name, value in inputs.model.state_dict.items()}
    classifier = ray.get(remote.remote(inputs.model.config, weights, manifest.classnames, plan))
    log.info("steer: %d values of k, ranked by %s", len(inputs.ks), ", ".join(inputs.rankings))
    task = SteerTask(
        inputs.model.portable(plan.precision), classifier, inputs.counts, tuple(inputs.ks), tuple(inputs.rankings),
        settings.output_offset, settings.seed, settings.batch_size,
    )  # fmt: skip
    totals, kept = UnitPass(
        "steer", manifest, inputs.model.config.image_size, task, SteerTotals, session, session.folder.key,
        settings.max_bad_fraction, settings.no_progress_minutes, settings.commit_seconds,
    ).run()  # fmt: skip
    num_settings = 1 + 2 * len(inputs.ks)
    nothing = MaskingAccuracy(num_settings, manifest.num_classes)
    return {ranking: totals.accuracy.get(ranking, nothing) for ranking in inputs.rankings}, kept


def _metric_files(rankings: list[str]) -> dict[str, str]:
    """The first ranking's table is metrics.csv, each other's metrics_{ranking}.csv."""
    return {ranking: "metrics.csv" if index == 0 else f"metrics_{ranking}.csv" for index, ranking in enumerate(rankings)}


def _identity(settings: SteerSettings, inputs: SteerInputs, precision: str) -> dict[str, Any]:
    return {
        **inputs.model.identity(precision),
        "manifest": inputs.manifest.digest,
        "classnames": list(inputs.manifest.classnames),
        "templates": storage.digest(OPENAI_IMAGENET_TEMPLATES),
        "counts": storage.digest([np.ascontiguousarray(inputs.counts, dtype=np.float64)]),
        "topk": inputs.ks,
        "rank_by": inputs.rankings,
        "output_offset": settings.output_offset,
        **({"seed": settings.seed} if "random" in inputs.rankings else {}),
    }


def _curves(accuracy: dict[str, MaskingAccuracy], ks: list[int]) -> dict[str, Any]:
    """Percent of all images predicted right, by ranking, switch and k."""
    curves: dict[str, Any] = {"ks": ks}
    for ranking, counts in accuracy.items():
        overall = counts.accuracy()
        curves["no_sae"] = float(overall[0])
        curves[ranking] = {"on": overall[1::2].tolist(), "off": overall[2::2].tolist()}
    return curves


def _files(inputs: SteerInputs, accuracy: dict[str, MaskingAccuracy], curves: dict[str, Any], kept: Pass) -> dict[str, bytes]:
    tables = {
        name: accuracy[ranking].table(inputs.ks).to_csv().encode() for ranking, name in _metric_files(inputs.rankings).items()
    }
    lines = {ranking: curves[ranking] for ranking in inputs.rankings}
    curve = figures.masking_curve(inputs.ks, lines, curves["no_sae"], inputs.manifest.num_classes)
    return {**tables, CURVE_FILE: curve, ERRORS_FILE: errors_parquet(kept.bad)}


def _metrics(curves: dict[str, Any], kept: Pass) -> dict[str, float]:
    """Stable names: accuracy_no_sae, accuracy_{ranking}_on_1, …"""
    metrics = {"accuracy_no_sae": curves["no_sae"], "wall_seconds": kept.wall_seconds()}
    for ranking in (name for name in RANKINGS if name in curves):
        for setting, value in zip(settings_of(curves["ks"])[1:], _interleaved(curves[ranking]), strict=True):
            metrics[f"accuracy_{ranking}_{setting}"] = value
    return metrics


def _interleaved(curve: dict[str, list[float]]) -> list[float]:
    return [value for pair in zip(curve["on"], curve["off"], strict=True) for value in pair]
