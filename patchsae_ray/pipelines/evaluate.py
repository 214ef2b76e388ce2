"""The metrics of an autoencoder on held-out images, as patchsae_ray/measure/README.md defines them.

Two passes where images are classified: the first runs the tower alone, for the mean residuals that mean ablation needs;
the second does everything else. Each commits under a run key of its own, so neither is lost with the job.
"""

import logging
import posixpath
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from patchsae_ray import storage
from patchsae_ray.data.catalog import find_entry, open_dataset
from patchsae_ray.data.kept import keep
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.measure.evaluation import PARTIALS, EvaluationTotals
from patchsae_ray.measure.evaluator import MeanTotals
from patchsae_ray.measure.recovered import conditions_of
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.evaluate_outputs import (
    OUTPUTS,
    evaluation_metrics,
    log_summary,
    objective_of,
    result_files,
    rows_of,
    summarise,
)
from patchsae_ray.pipelines.evaluate_worker import Chosen, EvaluateTask, HeadArrays, MeansTask, narrowed
from patchsae_ray.pipelines.extract import sample_positions
from patchsae_ray.pipelines.manifests import ManifestTasks
from patchsae_ray.pipelines.model import Inputs, load_model
from patchsae_ray.pipelines.passes import Pass, T, UnitPass
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once
from patchsae_ray.pipelines.steer_worker import classifier_rows
from patchsae_ray.pipelines.units import UnitTask
from patchsae_ray.redaction import redacted
from patchsae_ray.sae.checkpoint import SaeCheckpoint
from patchsae_ray.settings import EvaluateSettings
from patchsae_ray.writing import remove_empty, remove_tree

log = logging.getLogger(__name__)

HELD_OUT = ("validation", "val", "test")
"""Splits of a catalog entry that are measured by default, the first that it has; a test split's labels may be secret."""


def held_out_split(settings: EvaluateSettings) -> str | None:
    """The split that is measured: `--split`, or the catalog entry's held-out one; None for what other jobs read."""
    if settings.split or settings.dataset_path:
        return settings.split
    entry = find_entry(settings.dataset_name)
    return next((name for name in HELD_OUT if entry is not None and name in entry.splits), None)


@dataclass(frozen=True)
class EvaluateInputs(Inputs):
    """What an evaluation is about, read and checked."""

    split: str | None

    @property
    def checkpoint(self) -> SaeCheckpoint:
        """What is evaluated."""
        if self.model.checkpoint is None:
            raise ValueError("this run has no autoencoder")
        return self.model.checkpoint

    @property
    def classified(self) -> bool:
        """Whether there are labels, and names to make a classifier of."""
        return self.manifest.labelled and bool(self.manifest.classnames)


def read_evaluate_inputs(settings: EvaluateSettings) -> EvaluateInputs:
    """Everything that an evaluation needs.

    Raises: UserError for whatever is wrong with it.
    """
    split = held_out_split(settings)
    manifest = open_dataset(
        settings.dataset_name, settings.dataset_path, split, settings.classnames, settings.root_dir, settings.relist,
        ManifestTasks(settings.ray_address, settings.root_dir),
    )  # fmt: skip
    classified = manifest.labelled and bool(manifest.classnames)
    if manifest.labelled and not classified:
        log.info("evaluate: %s names no classes; --classnames FILE would add zero-shot metrics", manifest.source)
    return EvaluateInputs(load_model(settings, text=classified), manifest, split)


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """`jobs/evaluate.py`: write evaluation.json and what goes with it. Returns what that file holds.

    Raises: UserError for whatever is wrong with the settings, the inputs or the folder.
    """
    inputs = read_evaluate_inputs(settings)
    parts = (settings.vit_type, settings.dataset_name, inputs.checkpoint.digest[:8])
    uri = storage.join(settings.root_dir, "out", "evaluation", *parts)
    folders = {}
    for precision in cluster.possible_precisions(settings.precision):
        identity = _identity(settings, inputs, precision)
        folders[precision] = ResultFolder(uri, "evaluate", identity, dict.fromkeys(OUTPUTS, run_key(identity)))
    spent: list[str] = []

    def work(session: Session) -> Made:
        run = _Run(settings, replace(inputs, manifest=keep(inputs.manifest)), session)
        totals, kept = run.measure()
        spent.extend(run.spent)
        types = inputs.model.token_types(settings.tokens)
        found = totals.tokens.result(types) if totals.tokens else {}
        if totals.tokens is None or not found:
            raise UserError(f"{inputs.manifest.source}: no image could be read, so there is nothing to measure")
        zero_shot = totals.zero_shot.result(conditions_of(types)) if totals.zero_shot else None
        measured = summarise(found, zero_shot, objective_of(inputs.checkpoint.config), int(totals.tokens.images[0]))
        rows, summary = rows_of(measured, types), {**_about(settings, inputs), **measured}
        bad = [(run.chosen.place(position), path, reason) for position, path, reason in kept.bad]
        return Made(
            result_files(summary, rows, found, bad),
            summary,
            {**evaluation_metrics(rows), "images_per_second": kept.images_per_second()},
            kept.record(),
            spent=kept.bundles,
        )

    summary = run_once(settings, folders, work)
    _remove(spent)
    log_summary(summary, uri)
    return summary


class _Run:
    """Both passes on Ray."""

    def __init__(self, settings: EvaluateSettings, inputs: EvaluateInputs, session: Session) -> None:
        self._settings, self._inputs, self._session = settings, inputs, session
        manifest = inputs.manifest
        wanted = min(settings.eval_images or manifest.num_images, manifest.num_images)
        self._read: Manifest = manifest
        self.chosen = Chosen(None)
        if wanted < manifest.num_images:
            self._read, self.chosen = narrowed(manifest, sample_positions(manifest.num_images, wanted, settings.seed))
        self._model = inputs.model.portable(session.plan.precision)
        self._means_key = run_key({**session.folder.identity, "pass": "means"})
        self._key = run_key({**session.folder.identity, "partials": PARTIALS})
        self.spent: list[str] = []
        """Folders of the first pass's bundles."""
        log.info("evaluate: %s of %s images of %s", f"{wanted:,}", f"{manifest.num_images:,}", manifest.source)

    def measure(self) -> tuple[EvaluationTotals, Pass]:
        """All sums, and what was kept of the second pass.

        Raises: UserError past `--max_bad_fraction`, for an image that spoils it all, or where a pass cannot go on.
        """
        settings = self._settings
        head = self._head() if self._inputs.classified else None
        task = EvaluateTask(self._model, self.chosen, settings.tokens, settings.batch_size, head)
        return self._pass("evaluate", task, EvaluationTotals, self._key)

    def _head(self) -> HeadArrays:
        settings, model, plan = self._settings, self._inputs.model, self._session.plan
        task = MeansTask(replace(self._model, sae=None), self.chosen, settings.tokens, settings.batch_size)
        totals, kept = self._pass("evaluate: means", task, MeanTotals, self._means_key)
        self.spent.append(kept.bundles)
        means = totals.means()
        if means is None:
            raise UserError(f"{self._inputs.manifest.source}: no image could be read, so there is nothing to measure")
        classnames = self._inputs.manifest.classnames
        log.info("evaluate: classifier of %s classes", f"{len(classnames):,}")
        remote = ray.remote(classifier_rows).options(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus)
        weights = {name: value.numpy() for name, value in model.state_dict.items()}
        classifier: np.ndarray = ray.get(remote.remote(model.config, weights, model.adapter, classnames, plan))
        return HeadArrays(classifier, float(model.state_dict["logit_scale"]), means)

    def _pass(self, what: str, task: UnitTask, totals: type[T], key: str) -> tuple[T, Pass]:
        settings, image_size = self._settings, self._inputs.model.config.image_size
        return UnitPass(
            what, self._read, image_size, task, totals, self._session, key,
            settings.max_bad_fraction, settings.no_progress_minutes, settings.commit_seconds, whole=self._inputs.manifest,
        ).run()  # fmt: skip


def _about(settings: EvaluateSettings, inputs: EvaluateInputs) -> dict[str, Any]:
    """What evaluation.json says before the metrics; secrets of URIs are hidden."""
    return {
        "sae": redacted(inputs.checkpoint.path),
        "latents": inputs.checkpoint.sae.d_sae,
        "source": redacted(inputs.manifest.source),
        "split": inputs.split,
        "measured_tokens": settings.tokens,
    }


def _remove(folders: list[str]) -> None:
    """The results are committed: what remains of the first pass is untidy, and no fault."""
    for folder in folders:
        try:
            remove_tree(folder)
            remove_empty(posixpath.dirname(folder))
        except UserError as error:
            log.warning("%s; `jobs/extract.py --clean` removes what is left", error)


def _identity(settings: EvaluateSettings, inputs: EvaluateInputs, precision: str) -> dict[str, Any]:
    """What the results depend on; the seed only where it draws a sample."""
    drawn = 0 < settings.eval_images < inputs.manifest.num_images
    text = inputs.model.adapter.text_identity() if inputs.classified else {}
    return {
        **inputs.model.identity(precision),
        "manifest": inputs.manifest.digest,
        "classnames": list(inputs.manifest.classnames),
        **text,
        "objective": objective_of(inputs.checkpoint.config),
        "tokens": settings.tokens,
        "eval_images": settings.eval_images if drawn else 0,
        "seed": settings.seed if drawn else None,
    }
