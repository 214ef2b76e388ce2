"""What an evaluation writes: the metrics as JSON, as a long table and for MLflow, and the histogram of latent densities."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from patchsae_ray.figures_evaluate import latent_density
from patchsae_ray.measure.evaluation import TokenResult, objective_terms
from patchsae_ray.measure.recovered import ZeroShotResult, conditions_of
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet
from patchsae_ray.sae.window import LOG_DENSITY_EDGES

log = logging.getLogger(__name__)

JSON_FILE = "evaluation.json"
TABLE_FILE = "evaluation.csv"
FIGURE_FILE = "latent_density.png"
OUTPUTS = (JSON_FILE, TABLE_FILE, FIGURE_FILE, ERRORS_FILE)

Row = tuple[str, str, float | None, float | None, float | None]
"""(metric, tokens, value, low, high). Tokens: those measured, or whose residual is replaced; empty where none is. Low and high
of the 95 % interval, None of what has none."""

_RECONSTRUCTION = ("mse", "explained_variance", "explained_variance_legacy", "cosine")
_SPARSITY = ("l0", "l1", "dead_share", "dense_share")
_ZERO_SHOT = ("top1", "top1_mean_over_classes", "contrastive_loss")


def objective_of(config: Mapping[str, Any]) -> dict[str, float] | None:
    """l1_coefficient and mse_cls_coefficient (1 where it is not said) of a checkpoint's cfg; None where it names no first."""
    l1, cls = config.get("l1_coefficient"), config.get("mse_cls_coefficient", 1.0)
    if not isinstance(l1, int | float) or not isinstance(cls, int | float):
        return None
    return {"l1_coefficient": float(l1), "mse_cls_coefficient": float(cls)}


def summarise(
    found: Mapping[str, TokenResult], zero_shot: ZeroShotResult | None, objective: dict[str, float] | None, images: int
) -> dict[str, Any]:
    """The metrics as evaluation.json holds them; one that is not defined on these images is None.

    Args:
        found: by type of token, with `all`.
        zero_shot: None where nothing was classified.
        objective: of `objective_of`.
        images: measured.
    """
    return {
        "images": images,
        "tokens": {kind: result.num_tokens for kind, result in found.items()},
        "reconstruction": {kind: _fields(result, _RECONSTRUCTION) for kind, result in found.items()},
        "sparsity": {kind: _fields(result, _SPARSITY) for kind, result in found.items()},
        "objective": {**objective, **_finite(objective_terms(found, **objective))} if objective else None,
        "classification": _classification(zero_shot) if zero_shot else None,
        "latent_density": {
            "log10_edges": LOG_DENSITY_EDGES.tolist(),
            **{kind: {"counts": list(result.density), "never": result.never} for kind, result in found.items()},
        },
    }


def _fields(result: TokenResult, names: Sequence[str]) -> dict[str, float | None]:
    return _finite({name: getattr(result, name) for name in names})


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """NaN and infinity are no JSON."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _classification(found: ZeroShotResult) -> dict[str, Any]:
    recovered = {name: found.loss_recovered(name) for name in ("zero_ablation", "mean_ablation")}
    by_condition = {
        condition: _finite({name: getattr(found, name)[condition] for name in _ZERO_SHOT}) for condition in found.top1
    }
    intervals = {
        metric: {name: [bound if math.isfinite(bound) else None for bound in interval] for name, interval in of_metric.items()}
        for metric, of_metric in found.intervals.items()
    }
    return {
        "images": found.images, "classes": found.classes, **by_condition, "loss_recovered": _finite(recovered),
        "intervals": intervals,
    }  # fmt: skip


def rows_of(summary: Mapping[str, Any], types: Sequence[str]) -> list[Row]:
    """The rows of evaluation.csv.

    Args:
        summary: of `summarise`.
        types: of the tokens measured, by name.
    """
    rows: list[tuple[Any, ...]] = [("images", "", summary["images"])]
    for group in ("reconstruction", "sparsity"):
        rows += [(name, kind, value) for kind, of_kind in summary[group].items() for name, value in of_kind.items()]
    if summary["objective"]:
        rows += [(name, "all", summary["objective"][name]) for name in ("mse_loss", "l1_loss", "loss")]
    classification = summary["classification"]
    if classification:
        intervals = classification["intervals"]
        rows.append(("labelled_images", "", classification["images"]))
        for condition in conditions_of(types):
            of_condition = classification[condition.name]
            rows += [
                (f"{name}_{condition.what}", condition.tokens, value, *intervals[name][condition.name])
                for name, value in of_condition.items()
            ]
        recovered = classification["loss_recovered"]
        rows += [
            (f"loss_recovered_{name}", "all", value, *intervals["loss_recovered"][name]) for name, value in recovered.items()
        ]
    return [(*row, None, None)[:5] for row in rows]


def result_files(
    summary: Mapping[str, Any], rows: Sequence[Row], found: Mapping[str, TokenResult], bad: list[tuple[int, str, str]]
) -> dict[str, bytes]:
    """File name → content."""
    table = pd.DataFrame(rows, columns=["metric", "tokens", "value", "low", "high"])
    return {
        JSON_FILE: (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode(),
        TABLE_FILE: table.to_csv(index=False).encode(),
        FIGURE_FILE: latent_density(found),
        ERRORS_FILE: errors_parquet(bad),
    }


def evaluation_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """For MLflow: eval_{metric}, for one type of tokens eval_{metric}_{type}, with _low and _high; what is not defined is left
    out."""
    suffixes, found = {"": "", "all": ""}, {}
    for metric, tokens, *numbers in rows:
        name = f"eval_{metric}{suffixes.get(tokens, f'_{tokens}')}"
        found.update({f"{name}{end}": number for end, number in zip(("", "_low", "_high"), numbers, strict=True)})
    return {name: float(number) for name, number in found.items() if number is not None}


def log_summary(summary: Mapping[str, Any], folder: str) -> None:
    """The last lines of the job."""
    quality, sparsity = summary["reconstruction"]["all"], summary["sparsity"]["all"]
    log.info(
        "evaluate: %s images: explained variance %s, L0 %.1f of %s latents, %.2f %% of them dead, %.2f %% dense",
        f"{summary['images']:,}", _number(quality["explained_variance"]), sparsity["l0"], f"{summary['latents']:,}",
        100 * sparsity["dead_share"], 100 * sparsity["dense_share"],
    )  # fmt: skip
    classification = summary["classification"]
    if classification:
        recovered = classification["loss_recovered"]
        log.info(
            "evaluate: zero-shot top-1 %.2f %%%s without the SAE, %.2f %%%s with its reconstruction; "
            "loss recovered %s of zero ablation's, %s of mean ablation's",
            100 * classification["no_sae"]["top1"], _range(classification, "no_sae"),
            100 * classification["reconstruction"]["top1"], _range(classification, "reconstruction"),
            _number(recovered["zero_ablation"]), _number(recovered["mean_ablation"]),
        )  # fmt: skip
    log.info("evaluate: results in %s", folder)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _range(classification: Mapping[str, Any], condition: str) -> str:
    """The interval of top-1 in percent; empty where there is none, and of a run that was finished before there were any."""
    if "intervals" not in classification:
        return ""
    low, high = classification["intervals"]["top1"][condition]
    return "" if low is None else f" ({100 * low:.2f} to {100 * high:.2f})"
