"""Plain CLIP against an adapted one, from their finished runs: no pass over images, no Ray."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from patchsae_ray import figures_compare, storage
from patchsae_ray.errors import UserError
from patchsae_ray.measure.comparison import GROUPS, CountsChange, column_of, compare_counts
from patchsae_ray.measure.masking import halves_of
from patchsae_ray.pipelines.compare_page import page
from patchsae_ray.pipelines.compare_paired import change_in_words, paired_metrics, paired_table
from patchsae_ray.pipelines.compare_runs import ModelRun, images_of, read_runs
from patchsae_ray.pipelines.results import RUN_FILE, ResultFolder, run_key
from patchsae_ray.pipelines.tables import parquet_bytes
from patchsae_ray.settings import CompareSettings, as_dict
from patchsae_ray.tracking import tracked, upload_left
from patchsae_ray.writing import check_writable

log = logging.getLogger(__name__)

SHARED_KS = (10, 50, 100)
PAGE_FILE = "compare.html"
FILES = (
    "summary.json", "classes.csv", "classes.parquet", "latents.csv", "latents.parquet", "conditions.csv", "paired.csv",
    "groups.png", "counts.png", "steering.png", "examples.png", PAGE_FILE,
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What the tables, figures and the page are made of."""

    base: ModelRun
    adapted: ModelRun
    classes: pd.DataFrame
    """A row a class."""
    latents: pd.DataFrame
    """A row a class and latent among the largest of either model."""
    conditions: pd.DataFrame
    """A row a classifier, the counts that rank, switch and k."""
    paired: pd.DataFrame
    """A row a part of the classes and what was tried on them, the change on the same images; empty where a run does not say."""
    summary: dict[str, Any]


def compare(settings: CompareSettings) -> dict[str, Any]:
    """`jobs/compare.py`: tables, figures, and a page. Returns what summary.json holds.

    Raises: UserError where a run is not there or the two do not compare, or the folder holds another comparison.
    """
    base, adapted = read_runs(settings)
    if settings.classes != "all" and settings.classes not in base.summary["no_sae"]:
        raise UserError(f"--classes {settings.classes}: the runs were steered without an image of these classes")
    uri = comparison_folder(settings)
    chosen = {name: getattr(settings, name) for name in ("classes", "high_k", "low_k", "example_latents")}
    identity = {"base": base.key(), "adapted": adapted.key(), **chosen}
    folder = ResultFolder(uri, "compare", identity, dict.fromkeys(FILES, run_key(identity)), elsewhere="")
    if folder.done():
        log.info("compare: %s", folder.describe_done())
        upload_left(settings.root_dir, "compare", uri, folder.key)
        return dict(folder.record()["summary"])
    folder.check(settings.overwrite)
    check_writable(settings.root_dir)
    with tracked(settings.root_dir, "compare", as_dict(settings), uri, folder.key) as tracker:
        tracker.tags({**identity, "run_key": folder.key, "results": uri})
        found = compare_runs(base, adapted, settings)
        for name, data in _files(found, settings).items():
            folder.write(name, data)
        folder.commit({"settings": as_dict(settings), "mlflow_run": tracker.run_id, "summary": found.summary})
        tracker.metrics(_metrics(found.summary))
        tracker.files([*FILES, RUN_FILE])
    log.info("compare: %s", found.summary["finding"])
    log.info("compare: results in %s", uri)
    return found.summary


def comparison_folder(settings: CompareSettings) -> str:
    """{root_dir}/out/compare/{vit_type}/{dataset_name}/{classes}."""
    return storage.join(settings.root_dir, "out", "compare", settings.vit_type, settings.dataset_name, settings.classes)


def compare_runs(base: ModelRun, adapted: ModelRun, settings: CompareSettings) -> Comparison:
    """Everything that is said of two runs."""
    num_classes = base.counts.shape[1]
    part = {"all": slice(0, num_classes), **halves_of(num_classes)}[settings.classes]
    names = list(base.features["identity"]["classnames"])[part] or [str(c) for c in range(num_classes)[part]]
    bounds = (settings.high_k, settings.low_k, SHARED_KS)
    numbers = list(range(num_classes)[part])
    changes = {c: compare_counts(base.counts[:, c], adapted.counts[:, c], *bounds) for c in numbers}
    overall = compare_counts(base.counts[:, part].sum(axis=1), adapted.counts[:, part].sum(axis=1), *bounds)
    classes = _classes(base, adapted, changes, names, settings.classes)
    latents = _latents(base, adapted, changes, names)
    conditions = _conditions(base, adapted, settings.classes)
    paired = paired_table(base, adapted)
    summary = _summary(base, adapted, settings, classes, overall, conditions, paired)
    return Comparison(base, adapted, classes, latents, conditions, paired, summary)


def _classes(
    base: ModelRun, adapted: ModelRun, changes: Mapping[int, CountsChange], names: list[str], classes: str
) -> pd.DataFrame:
    halves = halves_of(base.counts.shape[1])
    rows = []
    for (number, change), name in zip(changes.items(), names, strict=True):
        tables = (run.metrics if classes == "all" else run.halves for run in (base, adapted))
        before, after = (float(table[str(number)].to_numpy()[0]) for table in tables)  # no_sae is the first row
        rows.append(
            {
                "class": number,
                "name": name,
                "half": "base" if number < halves["base"].stop else "novel",
                "accuracy_base": before,
                "accuracy_adapted": after,
                "accuracy_change": after - before,
                **{column_of(group): change.number(group) for group in GROUPS},
                "rank_correlation": change.rank_correlation,
                **{f"shared_{k}": share for k, share in change.shared.items()},
            }
        )
    return pd.DataFrame(rows)


def _latents(base: ModelRun, adapted: ModelRun, changes: Mapping[int, CountsChange], names: list[str]) -> pd.DataFrame:
    tables = [
        pd.DataFrame(
            {
                "class": number,
                "name": name,
                "latent": change.latents,
                "count_base": base.counts[change.latents, number],
                "count_adapted": adapted.counts[change.latents, number],
                "rank_base": change.ranks[0] + 1,
                "rank_adapted": change.ranks[1] + 1,
                "group": np.array(GROUPS)[change.groups],
            }
        )
        for (number, change), name in zip(changes.items(), names, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def _conditions(base: ModelRun, adapted: ModelRun, classes: str) -> pd.DataFrame:
    """Accuracy under each classifier, ranked by either model's counts, as far as the runs have it."""
    estimate = {"all": "mean_over_classes"}.get(classes, classes)
    rows = []
    for classifier, run, other in (("base", base, adapted), ("adapted", adapted, base)):
        mine, others = ("base", "adapted") if run is base else ("adapted", "base")
        rankings = {"class": mine}
        if run.steering["identity"].get("cross_counts") == other.steering["identity"]["counts"]:
            rankings["cross"] = others
        for ranking, counts in rankings.items():
            for setting, found in run.summary["rankings"][ranking]["settings"].items():
                switch, k = setting.split("_")
                rows.append({"classifier": classifier, "counts": counts, "switch": switch, "k": int(k), **found[estimate]})
    return pd.DataFrame(rows).astype({"low": np.float64, "high": np.float64})  # None is no interval


def _summary(
    base: ModelRun, adapted: ModelRun, settings: CompareSettings, classes: pd.DataFrame, overall: CountsChange,
    conditions: pd.DataFrame, paired: pd.DataFrame,
) -> dict[str, Any]:  # fmt: skip
    accuracy = {}
    for part, estimate in {"all": "mean_over_classes", "base": "base", "novel": "novel"}.items():
        if estimate in base.summary["no_sae"]:
            accuracy[part] = {run.vit_type: run.summary["no_sae"][estimate] for run in (base, adapted)}
    groups = {group: float(classes[column_of(group)].mean()) for group in GROUPS}
    found = {
        "adapter": adapted.vit_type,
        "classes": settings.classes,
        "num_classes": len(classes),
        "images": {"features": int(base.features["num_images"]), "steering": int(base.summary["images"])},
        "accuracy": accuracy,
        "paired": paired.to_dict("records") or None,
        "high_k": settings.high_k,
        "low_k": settings.low_k,
        "latents_a_class": groups,
        "latents_over_all": {group: overall.number(group) for group in GROUPS},
        "rank_correlation": {
            "mean_over_classes": float(classes["rank_correlation"].mean()),
            "over_all": overall.rank_correlation,
        },
        "shared": {str(k): float(classes[f"shared_{k}"].mean()) for k in overall.shared},
        "cross_conditions": sorted(
            {f"{c} by {n}" for c, n in zip(conditions["classifier"], conditions["counts"], strict=True)}
        ),
    }
    return without_nan({"finding": finding(found, conditions), **found})


def without_nan(value: Any) -> Any:
    """The same with None for what has no value, as JSON has it."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def finding(summary: Mapping[str, Any], conditions: pd.DataFrame) -> str:
    """What came out, in a sentence or two."""
    part, adapter = summary["classes"], summary["adapter"]
    before, after = (summary["accuracy"][part][name]["percent"] for name in ("base", adapter))
    groups = summary["latents_a_class"]
    looked_at = sum(groups.values())
    shares = {group: 100 * number / looked_at if looked_at else 0.0 for group, number in groups.items()}
    which = {"all": "", "base": " on the base classes", "novel": " on the novel classes"}[part]
    correlation = summary["rank_correlation"]["mean_over_classes"]
    correlated = "" if math.isnan(correlation) else f" (rank correlation of the counts {correlation:.3f})"
    change = change_in_words(summary, after - before)
    said = (
        f"With {adapter} accuracy{which} goes from {before:.2f} % to {after:.2f} % ({change}); "
        f"of a class's leading latents {shares['high in both']:.0f} % stay high, {shares['high to low']:.1f} % fall and "
        f"{shares['low to high']:.1f} % rise{correlated}."
    )
    swapped = swapping(conditions)
    return said if swapped is None else f"{said} {swapped}"


def swapping(conditions: pd.DataFrame) -> str | None:
    """What ranking by the other model's counts changes, at the k where it changes most."""
    on = conditions[conditions["switch"] == "on"].pivot_table(index="k", columns=["classifier", "counts"], values="percent")
    wanted = [("adapted", "adapted"), ("adapted", "base")]
    if any(column not in on for column in wanted):
        return None
    difference = on[wanted[1]] - on[wanted[0]]
    k = int(difference.index.to_numpy()[difference.abs().to_numpy().argmax()])
    return (
        f"Ranked by plain CLIP's counts in place of its own, the adapted model moves most at k = {k:,}: from "
        f"{on[wanted[0]][k]:.2f} % to {on[wanted[1]][k]:.2f} % with only these latents kept."
    )


def _files(found: Comparison, settings: CompareSettings) -> dict[str, bytes]:
    examples = _examples(found.latents, settings.example_latents)
    images = images_of(found.base, settings.base_root_dir or settings.root_dir) if len(examples) else None
    figures = {
        "groups.png": figures_compare.groups(found.classes, found.adapted.vit_type),
        "counts.png": figures_compare.counts(found.latents, found.adapted.vit_type),
        "steering.png": figures_compare.conditions(found.conditions, found.summary, found.adapted.vit_type),
        "examples.png": figures_compare.examples(examples, found.base.top, found.adapted.top, images, found.adapted.vit_type),
    }
    tables = {"classes": found.classes, "latents": found.latents}
    text = page(found.summary, found.classes, found.conditions, figures, found.base, found.adapted, len(examples))
    return {
        "summary.json": (json.dumps(found.summary, indent=1, allow_nan=False) + "\n").encode(),
        **{f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items()},
        **{
            f"{name}.parquet": parquet_bytes(pa.Table.from_pandas(table, preserve_index=False))
            for name, table in tables.items()
        },
        "conditions.csv": found.conditions.to_csv(index=False).encode(),
        "paired.csv": found.paired.to_csv(index=False).encode(),
        **figures,
        PAGE_FILE: text.encode(),
    }


def _examples(latents: pd.DataFrame, number: int) -> pd.DataFrame:
    """Of each direction the pairs of class and latent whose counts moved furthest, each latent once, those that fell or rose by
    the rule before others."""
    moved = latents.assign(by=latents["count_adapted"] - latents["count_base"])
    parts = []
    for group, part in (("high to low", moved[moved["by"] < 0]), ("low to high", moved[moved["by"] > 0])):
        ranked = part.assign(other=part["group"] != group, far=-part["by"].abs()).sort_values(["other", "far"], kind="stable")
        parts.append(ranked.drop_duplicates("latent").head(number))
    return pd.concat(parts)


def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """For MLflow, under stable names."""
    metrics = {f"latents_{column_of(group)}": value for group, value in summary["latents_a_class"].items()}
    metrics.update({f"shared_{k}": value for k, value in summary["shared"].items() if value is not None})
    correlations = summary["rank_correlation"].items()
    metrics.update({f"rank_correlation_{name}": value for name, value in correlations if value is not None})
    for part, models in summary["accuracy"].items():
        metrics.update({f"accuracy_{part}_{name}": found["percent"] for name, found in models.items()})
    return {**metrics, **paired_metrics(summary)}
