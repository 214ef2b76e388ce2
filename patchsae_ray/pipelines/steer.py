"""Zero-shot classification with only the k first latents, and without them: every k and every ranking in one pass."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.measure.rankings import Ranking, parse_rankings
from patchsae_ray.measure.steering import SteeringSettings
from patchsae_ray.measure.steering_totals import PARTIALS, SteeringTotals
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.counts import read_counts
from patchsae_ray.pipelines.model import Inputs, read_inputs
from patchsae_ray.pipelines.passes import Pass, UnitPass
from patchsae_ray.pipelines.results import ResultFolder, record_of_file, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.steer_outputs import (
    check_predictions_fit,
    output_names,
    result_files,
    steering_metrics,
    summarise,
    with_interval,
)
from patchsae_ray.pipelines.steer_worker import SteerTask, classifier_rows
from patchsae_ray.settings import SteerSettings

log = logging.getLogger(__name__)


def parse_topk(text: str, num_latents: int) -> tuple[int, ...]:
    """`1,2,all` → ascending numbers of latents; `all` is the width. Of the default list, those above the width are dropped.

    Raises: UserError for what is no number, 0, or above the width.
    """
    default = text == SteerSettings.topk
    ks: set[int] = set()
    for part in (piece.strip() for piece in text.split(",")):
        if part == "all":
            ks.add(num_latents)
            continue
        if not part.isdecimal() or len(part) > 9 or int(part) == 0:
            raise UserError(f"--topk {part[:40]!r}: numbers of latents from 1, or all, separated by commas")
        if int(part) <= num_latents:
            ks.add(int(part))
        elif not default:
            raise UserError(f"--topk {part}: the SAE has {num_latents} latents")
    return tuple(sorted(ks))


@dataclass(frozen=True)
class SteerInputs(Inputs):
    """What a steering run is about, read and checked."""

    counts: np.ndarray | None
    """[s, c], where a ranking needs them."""
    cross: np.ndarray | None
    """[s, c] of another model, for the ranking cross."""
    steering: SteeringSettings


def read_steer_inputs(settings: SteerSettings) -> SteerInputs:
    """Everything that steering needs.

    Raises: UserError for whatever is wrong with it.
    """
    rankings = tuple(parse_rankings(settings.rank_by))
    _check_counts_given(settings, rankings)
    inputs = read_inputs(settings, text=True)
    model, manifest = inputs.model, inputs.manifest
    if not manifest.labelled:
        raise UserError(f"{manifest.source} has no labels: steering is measured on labelled images")
    if not manifest.classnames:
        raise UserError(f"{manifest.source} names no classes: --classnames FILE is needed for the zero-shot classifier")
    if manifest.num_classes > len(manifest.classnames):
        raise UserError(f"{manifest.source} has {manifest.num_classes} labels, but {len(manifest.classnames)} class names")
    if settings.intervene == "patch" and model.block_layer == model.config.layers - 1:
        raise UserError(
            "--intervene patch: after the last block only the CLS token is read, so nothing would change; "
            "cls, image or all would be right, or an earlier --block_layer"
        )
    ks = parse_topk(settings.topk, model.autoencoder.d_sae)
    if settings.predictions:
        check_predictions_fit(manifest.num_images, rankings, ks)
    own, other = settings.cls_wise_sae_activation_path, settings.cross_counts
    counts, cross = (read_counts(path, settings, model, manifest) if path else None for path in (own, other))
    steering = SteeringSettings(
        ks, rankings, settings.intervene, settings.error_term, settings.output_offset, settings.predictions
    )
    return SteerInputs(model, manifest, counts, cross, steering)


def _check_counts_given(settings: SteerSettings, rankings: tuple[Ranking, ...]) -> None:
    wanting = [ranking.name for ranking in rankings if ranking.needs_counts]
    if wanting and not settings.cls_wise_sae_activation_path:
        raise UserError(f"--cls_wise_sae_activation_path is needed for --rank_by {wanting[0]}: cls_sae_cnt.npy of extract")
    crossed = any(ranking.name == "cross" for ranking in rankings)
    if crossed != bool(settings.cross_counts):
        raise UserError(
            "--cross_counts, another model's cls_sae_cnt.npy, and --rank_by cross go together: give both or neither"
        )
    if not wanting and not crossed and settings.counts_orientation != "auto":
        raise UserError(
            f"--counts_orientation has no use with --rank_by {settings.rank_by}, which reads no counts: leave it out"
        )
    if not wanting and settings.cls_wise_sae_activation_path:
        raise UserError(f"--cls_wise_sae_activation_path has no use with --rank_by {settings.rank_by}: leave it out")


def steer(settings: SteerSettings) -> dict[str, Any]:
    """`jobs/steer.py`: write metrics.csv and what goes with it. Returns what summary.json holds.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    inputs = read_steer_inputs(settings)
    uri = storage.join(settings.root_dir, "eval_outputs", settings.vit_type, settings.dataset_name)
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = _identity(settings, inputs, precision)
        outputs = dict.fromkeys(output_names(inputs.steering), run_key(identity))
        folders[precision] = ResultFolder(uri, "steer", identity, outputs)

    def work(session: Session) -> Made:
        totals, kept = run_steering(settings, inputs, session)
        summary, curves = summarise(totals, inputs.steering, inputs.manifest)
        sources = {"counts": settings.cls_wise_sae_activation_path, "cross_counts": settings.cross_counts}
        records = {name: record_of_file(path) for name, path in sources.items() if path}
        made_by = {f"{name}_run_key": record["run_key"] if record else None for name, record in records.items()}
        return Made(
            result_files(inputs.steering, inputs.manifest, totals, curves, summary, kept.bad, settings.seed),
            summary,
            {**steering_metrics(summary), "wall_seconds": kept.wall_seconds(), "images_per_second": kept.images_per_second()},
            {"source": inputs.manifest.source, **kept.record()},
            tags=made_by,
            spent=kept.bundles,
        )

    summary = run_once(settings, folders, work)
    _log_summary(summary, inputs, uri)
    return summary


def _log_summary(summary: dict[str, Any], inputs: SteerInputs, uri: str) -> None:
    log.info("steer: zero-shot accuracy without the SAE %s", with_interval(summary["no_sae"]))
    first = summary["rankings"][inputs.steering.rankings[0].name]["settings"]
    whole = first.get(f"on_{inputs.model.autoencoder.d_sae}")
    if whole is not None:
        log.info("steer: zero-shot accuracy with all latents kept %s", with_interval(whole))
    log.info("steer: results in %s", uri)


def run_steering(settings: SteerSettings, inputs: SteerInputs, session: Session) -> tuple[SteeringTotals, Pass]:
    """The pass on Ray: right predictions by ranking, and what was kept of the pass.

    Raises: UserError past `--max_bad_fraction`, or where the pass cannot go on.
    """
    manifest, plan = inputs.manifest, session.plan
    log.info("steer: classifier of %s classes", f"{len(manifest.classnames):,}")
    remote = ray.remote(classifier_rows).options(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus)
    weights = {name: value.numpy() for name, value in inputs.model.state_dict.items()}
    classifier = ray.get(remote.remote(inputs.model.config, weights, inputs.model.adapter, manifest.classnames, plan))
    steering = inputs.steering
    names = [f"{ranking.orders} {ranking.name}" if ranking.orders > 1 else ranking.name for ranking in steering.rankings]
    log.info("steer: %d values of k, ranked by %s", len(steering.ks), ", ".join(names))
    task = SteerTask(
        inputs.model.portable(plan.precision), classifier, float(inputs.model.state_dict["logit_scale"]), inputs.counts,
        inputs.cross, steering, settings.seed, settings.batch_size,
    )  # fmt: skip
    totals, kept = UnitPass(
        "steer", manifest, inputs.model.config.image_size, task, SteeringTotals, session, bundle_key(session),
        settings.max_bad_fraction, settings.no_progress_minutes, settings.commit_seconds,
    ).run()  # fmt: skip
    if not totals.accuracy or not any(accuracy.images.sum() for accuracy in totals.accuracy.values()):
        raise UserError(f"{manifest.source}: no image with a label could be read, so there is nothing to write")
    return totals, kept


def bundle_key(session: Session) -> str:
    """The run key of the bundles: that of the results, and of the form that partial results have."""
    return run_key({**session.folder.identity, "partials": PARTIALS})


def _identity(settings: SteerSettings, inputs: SteerInputs, precision: str) -> dict[str, Any]:
    counts = {"counts": inputs.counts, "cross_counts": inputs.cross}
    steering = asdict(inputs.steering)
    rankings = [f"{ranking.name}:{ranking.orders}" for ranking in inputs.steering.rankings]
    return {
        **inputs.model.identity(precision),
        "manifest": inputs.manifest.digest,
        "classnames": list(inputs.manifest.classnames),
        **inputs.model.adapter.text_identity(),
        **{name: _counts_digest(found) for name, found in counts.items() if found is not None},
        **{name: value for name, value in steering.items() if name != "rankings"},
        "rank_by": ",".join(rankings),
        "seed": settings.seed,
    }


def _counts_digest(counts: np.ndarray) -> str:
    return storage.digest([np.ascontiguousarray(counts, dtype=np.float64)])
