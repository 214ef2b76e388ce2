"""Finished runs of plain and of adapted CLIP, read and checked against each other."""

import io
import json
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from patchsae_ray import storage
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.inert import load_inert
from patchsae_ray.pipelines.counts import read_array
from patchsae_ray.pipelines.extract import COUNTS_FILE
from patchsae_ray.pipelines.results import record_of_file
from patchsae_ray.pipelines.steer_outputs import HALVES_FILE, OUTCOMES_FILE, SUMMARY_FILE
from patchsae_ray.settings import CompareSettings

TOP_FILE = "max_activating_image_indices.pt"
_SAME_MODEL = ("sae", "clip", "block_layer", "quick_gelu", "precision", "manifest", "classnames")
_SAME = {
    "features": (*_SAME_MODEL, "tokens", "threshold"),
    "steering": (*_SAME_MODEL, "ks", "intervene", "error_term", "output_offset"),
}


@dataclass(frozen=True)
class ModelRun:
    """What is kept of one model: its features, and its steering."""

    vit_type: str
    counts: np.ndarray
    """[s, c]."""
    features: Mapping[str, Any]
    """The record of the run that counted."""
    steering: Mapping[str, Any]
    """The record of the run that steered."""
    summary: Mapping[str, Any]
    """Its summary.json."""
    metrics: pd.DataFrame
    """Percent by setting and class, among all classes."""
    halves: pd.DataFrame
    """The same among the class's own half."""
    top: np.ndarray | None
    """[s, k] positions of top images, -1 in an empty slot; None where only counts were made."""
    outcomes: str | None
    """Where its steering run says of each image what was right; None of a run that was made before such files were."""

    def key(self) -> dict[str, str]:
        """The run keys of what it was read from."""
        return {"features": str(self.features["run_key"]), "steering": str(self.steering["run_key"])}


def read_runs(settings: CompareSettings) -> tuple[ModelRun, ModelRun]:
    """(base, adapted).

    Raises: UserError where one is not there or unfinished, or they are of different SAEs, images, classes or settings.
    """
    base = read_run(settings.base_root_dir or settings.root_dir, "base", settings.dataset_name)
    adapted = read_run(settings.root_dir, settings.vit_type, settings.dataset_name)
    for what, keys in _SAME.items():
        first, second = (_compared(getattr(run, what)["identity"]) for run in (base, adapted))
        for key in keys:
            if first.get(key) != second.get(key):
                raise UserError(
                    f"the {what} of base and of {settings.vit_type} do not compare: {key} is {_short(first.get(key))} there "
                    f"and {_short(second.get(key))} here; run one of them again"
                )
    return base, adapted


def _compared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as far as it matters here: the counts compared are those of the first threshold."""
    first = str(identity["threshold"]).split(",")[0] if "threshold" in identity else None
    return {**identity, "threshold": first}


def read_run(root: str, vit_type: str, dataset: str) -> ModelRun:
    """One model's run under a root.

    Raises: UserError where something of it is not there.
    """
    features = storage.join(root, "out", "feature_data", vit_type, dataset)
    steered = storage.join(root, "eval_outputs", vit_type, dataset)
    counted = _finished(features, COUNTS_FILE, "jobs/extract.py", vit_type)
    steering = _finished(steered, SUMMARY_FILE, "jobs/steer.py", vit_type)
    counts = read_array(storage.join(features, COUNTS_FILE))
    summary = _read_summary(storage.join(steered, SUMMARY_FILE))
    ranking = summary["rankings"].get("class")
    if ranking is None:
        raise UserError(f"{steered}: steered by {', '.join(summary['rankings'])}; --rank_by class is needed to compare")
    counts_digest = storage.digest([np.ascontiguousarray(counts, dtype=np.float64)])
    if steering["identity"].get("counts") != counts_digest:
        raise UserError(
            f"{steered} was steered by other counts than {storage.join(features, COUNTS_FILE)}: run jobs/steer.py again"
        )
    metrics = _table(storage.join(steered, posixpath.basename(ranking["table"])), counts.shape[1])
    halves = _table(storage.join(steered, HALVES_FILE), counts.shape[1], "class").drop(columns="ranking")
    outcomes = storage.join(steered, OUTCOMES_FILE)
    by_image = record_of_file(outcomes)
    paired = outcomes if by_image is not None and by_image["run_key"] == steering["run_key"] else None
    return ModelRun(vit_type, counts, counted, steering, summary, metrics, halves, _top(features, counted), paired)


@contextmanager
def _undamaged(uri: str, job: str = "jobs/steer.py") -> Iterator[None]:
    """What a damaged file makes its readers raise → UserError that names it and the job that makes it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{uri} is damaged; {job} --overwrite makes it anew") from error


def _read_summary(uri: str) -> dict[str, Any]:
    """Steering's summary.json, once all that is read of it is seen to be there.

    Raises: UserError where it is damaged.
    """
    text = storage.read_text(uri)
    with _undamaged(uri):
        summary: dict[str, Any] = json.loads(text)
        rankings = summary["rankings"].values()
        settings = [setting for ranking in rankings for setting in ranking["settings"]]
        rows = [row for ranking in rankings for row in ranking["settings"].values()]
        for part in ("mean_over_classes", *summary["no_sae"]):
            [row[part]["percent"] for row in (summary["no_sae"], *rows)]
        [int(k) for _, k in (setting.split("_") for setting in settings)]
        [posixpath.basename(ranking["table"]) for ranking in rankings]
        int(summary["images"])
    return summary


def _table(uri: str, num_classes: int, ranking: str | None = None) -> pd.DataFrame:
    """One of steering's tables, with a number for each class; of several rankings' the rows of one.

    Raises: UserError where it is damaged.
    """
    data = storage.read_bytes(uri)
    with _undamaged(uri):
        table = pd.read_csv(io.BytesIO(data), index_col="masking")
        table = table if ranking is None else table[table["ranking"] == ranking]
        if table[[str(number) for number in range(num_classes)]].astype(np.float64).empty:
            raise ValueError("no rows")
    return table


def _top(features: str, counted: Mapping[str, Any]) -> np.ndarray | None:
    uri = storage.join(features, TOP_FILE)
    record = record_of_file(uri)
    if record is None or record["run_key"] != counted["run_key"]:
        return None
    top = load_inert(uri, storage.read_bytes(uri), lambda name: False, "tensors")
    with _undamaged(uri, "jobs/extract.py"):
        return np.asarray(top.numpy())


def _finished(folder: str, name: str, job: str, vit_type: str) -> dict[str, Any]:
    uri = storage.join(folder, name)
    record = record_of_file(uri)
    if record is None or not storage.exists(uri):
        raise UserError(f"{uri}: no finished run made it; {job} --vit_type {vit_type} would")
    return record


def images_of(run: ModelRun, root: str) -> Manifest | None:
    """The images that the features under a root were made of, where they can still be read and are the same."""
    made = run.features["settings"]
    try:
        manifest = open_dataset(made["dataset_name"], made["dataset_path"], made["split"], made["classnames"], root)
    except UserError:
        return None
    return manifest if manifest.digest == run.features["identity"]["manifest"] else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:24] + "…"
