"""What a steering run writes: tables, summary, curve, and predictions on request."""

import io
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from patchsae_ray import figures
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.measure.intervals import LEVEL
from patchsae_ray.measure.masking import MaskingCurve, halves_of, masked_settings, settings_of
from patchsae_ray.measure.outcomes import NOT_MEASURED, Outcomes, tried
from patchsae_ray.measure.rankings import RANKINGS, Ranking
from patchsae_ray.measure.steering import SteeringSettings, prediction_columns
from patchsae_ray.measure.steering_totals import Predictions, SteeringTotals
from patchsae_ray.pipelines.tables import ERRORS_FILE, errors_parquet, parquet_bytes

CURVE_FILE = "masking_curve.png"
SUMMARY_FILE = "summary.json"
HALVES_FILE = "metrics_halves.csv"
PREDICTIONS_FILE = "predictions.parquet"
OUTCOMES_FILE = "outcomes.parquet"
"""Which images were right, for a comparison on the same images."""
_ROW_GROUP = 2**20
MAX_PREDICTION_BYTES = 4 * 2**30
"""Of all predictions, which the driver holds at the end."""

Curves = dict[str, MaskingCurve]
"""By the ranking's name."""


def metrics_file(index: int, ranking: Ranking) -> str:
    """The first ranking's table is metrics.csv, each other's metrics_{ranking}.csv."""
    return "metrics.csv" if index == 0 else f"metrics_{ranking.name}.csv"


def output_names(steering: SteeringSettings) -> list[str]:
    """The files that the run will have written."""
    tables = [metrics_file(index, ranking) for index, ranking in enumerate(steering.rankings)]
    more = [PREDICTIONS_FILE] if steering.predictions else []
    return [*tables, HALVES_FILE, SUMMARY_FILE, CURVE_FILE, OUTCOMES_FILE, ERRORS_FILE, *more]


def check_predictions_fit(num_images: int, rankings: Sequence[Ranking], ks: Sequence[int]) -> None:
    """Predictions are gathered on the driver, so there is a limit to them.

    Raises: UserError past MAX_PREDICTION_BYTES.
    """
    columns = 1 + 2 * len(ks) * sum(ranking.orders for ranking in rankings)
    most = MAX_PREDICTION_BYTES // (8 * columns)
    if num_images > most:
        raise UserError(
            f"--predictions of {num_images:,} images under {columns} settings do not fit; "
            f"{most:,} images would, or fewer values of --topk or rankings of --rank_by"
        )


def summarise(totals: SteeringTotals, steering: SteeringSettings, manifest: Manifest) -> tuple[dict[str, Any], Curves]:
    """What summary.json holds, and the curves that it is made of."""
    curves = {ranking.name: totals.accuracy[ranking.name].curve() for ranking in steering.rankings}
    halves = {
        ranking.name: {
            half: totals.in_half[ranking.name].only(classes).curve()
            for half, classes in halves_of(manifest.num_classes).items()
            if totals.in_half[ranking.name].only(classes).images.sum()
        }
        for ranking in steering.rankings
    }
    first = steering.rankings[0].name
    names = settings_of(steering.ks)
    images = totals.accuracy[first].images
    return {
        "images": int(images.sum()),
        "classes": manifest.num_classes,
        "classes_with_images": int((images > 0).sum()),
        "ks": list(steering.ks),
        "intervene": steering.intervene,
        "error_term": steering.error_term,
        "output_offset": steering.output_offset,
        "intervals": f"{100 * LEVEL:g} %, over other images of the same classes and other random orders; null where unknown",
        "no_sae": _row(curves[first], halves[first], 0),
        "rankings": {
            ranking.name: {
                "ranked_by": RANKINGS[ranking.name],
                "orders": ranking.orders,
                "table": metrics_file(index, ranking),
                "settings": {
                    name: _row(curves[ranking.name], halves[ranking.name], row) for row, name in enumerate(names) if row
                },
            }
            for index, ranking in enumerate(steering.rankings)
        },
    }, curves


def _row(curve: MaskingCurve, halves: Curves, row: int) -> dict[str, dict[str, float | None]]:
    """A setting's estimates; `base` and `novel` are means over the half's classes, classified among themselves."""
    found = {field.name: estimate(getattr(curve, field.name)[row]) for field in fields(curve) if row or field.name != "change"}
    return {**found, **{half: estimate(of_half.mean_over_classes[row]) for half, of_half in halves.items()}}


def estimate(numbers: np.ndarray) -> dict[str, float | None]:
    """Value, low and high as JSON has them: None where there is no interval."""
    value, low, high = (None if np.isnan(number) else round(float(number), 6) for number in numbers)
    return {"percent": value, "low": low, "high": high}


def _halves_table(steering: SteeringSettings, totals: SteeringTotals) -> pd.DataFrame:
    """metrics_halves.csv: as metrics.csv, each class classified among its own half, the rankings below each other."""
    tables = {ranking.name: totals.in_half[ranking.name].table(steering.ks) for ranking in steering.rankings}
    return pd.concat(tables, names=["ranking"])


def with_interval(row: dict[str, dict[str, Any]]) -> str:
    """A row of summary.json, averaged over classes, as text."""
    found = row["mean_over_classes"]
    interval = "no interval: one image a class" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"
    return f"{found['percent']:6.2f} % ({interval})"


def steering_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """For MLflow: accuracy_no_sae, accuracy_{ranking}_on_1 and so on, means over classes, with _low and _high."""
    metrics: dict[str, float] = {"images": summary["images"]}

    def put(name: str, found: dict[str, float | None]) -> None:
        numbers = {name: found["percent"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        metrics.update({key: number for key, number in numbers.items() if number is not None})

    put("accuracy_no_sae", summary["no_sae"]["mean_over_classes"])
    for ranking, of_ranking in summary["rankings"].items():
        for setting, found in of_ranking["settings"].items():
            put(f"accuracy_{ranking}_{setting}", found["mean_over_classes"])
    return metrics


def result_files(
    steering: SteeringSettings, manifest: Manifest, totals: SteeringTotals, curves: Curves, summary: dict[str, Any],
    bad: list[tuple[int, str, str]], seed: int,
) -> dict[str, bytes]:  # fmt: skip
    """File name → content."""
    files = {
        metrics_file(index, ranking): totals.accuracy[ranking.name].table(steering.ks).to_csv().encode()
        for index, ranking in enumerate(steering.rankings)
    }
    files[HALVES_FILE] = _halves_table(steering, totals).to_csv().encode()
    files[SUMMARY_FILE] = (json.dumps(summary, indent=1) + "\n").encode()
    files[CURVE_FILE] = figures.masking_curve(steering.ks, steering.rankings, curves, manifest.num_classes)
    assert totals.outcomes is not None
    files[OUTCOMES_FILE] = outcomes_parquet(totals.outcomes, manifest.num_images)
    files[ERRORS_FILE] = errors_parquet(bad)
    if steering.predictions:
        predictions = totals.predictions()
        columns = prediction_columns(steering.rankings, masked_settings(steering.ks), seed)
        assert predictions is not None
        files[PREDICTIONS_FILE] = predictions_parquet(predictions, columns, manifest)
    return files


def outcomes_parquet(outcomes: Outcomes, num_images: int) -> bytes:
    """A row an image of the data set by position: its class, and whether it was right under what `tried` names.

    Empty where an image has no label or could not be read. Some bits an image, and its class where classes are not in runs.
    """
    names = tried(outcomes.tried > 2)
    schema = pa.schema([("label", pa.int32()), *((name, pa.bool_()) for name in names)])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for labels, right in outcomes.blocks(num_images, _ROW_GROUP):
            absent = labels == NOT_MEASURED
            columns = [pa.array(values, mask=absent) for values in (labels, *right)]
            writer.write_table(pa.table(columns, schema=schema))
    return buffer.getvalue()


def predictions_parquet(predictions: Predictions, columns: Sequence[str], manifest: Manifest) -> bytes:
    """A row an image: position, path, true class, then predicted class and margin under each setting."""
    table: dict[str, Any] = {
        "position": predictions.positions,
        "path": _paths(manifest, predictions.positions),
        "label": predictions.labels,
    }
    for index, column in enumerate(columns):
        table[column] = predictions.classes[:, index]
        table[f"{column}_margin"] = predictions.margins[:, index]
    return parquet_bytes(pa.table(table))


def _paths(manifest: Manifest, positions: np.ndarray) -> list[str]:
    """A name for each of the images at ascending positions."""
    found: list[str] = []
    for unit in manifest.units:
        low, high = np.searchsorted(positions, [unit.start, unit.start + unit.count])
        names = manifest.paths(unit)
        found += [names[position - unit.start] for position in positions[low:high].tolist()]
    return found
