"""Plain against adapted CLIP on the very same images, from what the two steering runs say of each."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from patchsae_ray import storage
from patchsae_ray.errors import UserError, first_line
from patchsae_ray.measure.masking import halves_of
from patchsae_ray.measure.outcomes import PairedCounts
from patchsae_ray.pipelines.compare_runs import ModelRun

PAIRED_COLUMNS = ("classes", "tried", "images", "gained", "lost", "change", "low", "high")
_ENDS = {"": "change", "_low": "low", "_high": "high"}
_IMAGES_AT_ONCE = 2**20


def paired_table(base: ModelRun, adapted: ModelRun) -> pd.DataFrame:
    """The change of accuracy from plain to adapted on the very same images, in points, with its interval."""
    found = _paired_counts(base, adapted)
    if found is None:
        return pd.DataFrame(columns=PAIRED_COLUMNS)
    counts, names = found
    rows = []
    for part, classes in {"all": slice(None), **halves_of(len(counts.images))}.items():
        for name in ("no_sae", "reconstruction"):
            column = name if part == "all" else f"{name}_in_half"
            if column in names and counts.images[classes].any():
                one = counts.change(names.index(column), classes)
                rows.append((part, name, one.images, one.gained, one.lost, *(100 * one.change).round(6).tolist()))
    return pd.DataFrame(rows, columns=PAIRED_COLUMNS)


def _paired_counts(base: ModelRun, adapted: ModelRun) -> tuple[PairedCounts, list[str]] | None:
    """On which of the same images the two differ, and what was tried with both; None where a run does not say it by image.

    Raises: UserError where the two files are not of the same images, or one is damaged.
    """
    if base.outcomes is None or adapted.outcomes is None:
        return None
    opened = [_open(uri) for uri in (base.outcomes, adapted.outcomes)]
    names = [name for name in opened[0].schema_arrow.names[1:] if name in opened[1].schema_arrow.names]
    found = PairedCounts(len(names), base.counts.shape[1])
    batches = (file.iter_batches(_IMAGES_AT_ONCE, columns=["label", *names]) for file in opened)
    unlike = UserError(f"{base.outcomes} and {adapted.outcomes} are not of the same images: steer one of them again")
    if opened[0].metadata.num_rows != opened[1].metadata.num_rows:
        raise unlike
    for first, second in zip(*batches, strict=True):
        labels, others = (batch.column("label").fill_null(-1).to_numpy() for batch in (first, second))
        both = (labels >= 0) & (others >= 0)
        if not np.array_equal(labels[both], others[both]):
            raise unlike
        right = [
            np.stack([batch.column(name).fill_null(False).to_numpy(zero_copy_only=False)[both] for name in names])
            for batch in (first, second)
        ]
        found.update(labels[both], *right)
    return found, names


def _open(uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
    except pa.ArrowException as error:
        raise UserError(
            f"{uri} is no whole Parquet file: {first_line(error)}; jobs/steer.py --overwrite makes it anew"
        ) from error


def change_in_words(summary: Mapping[str, Any], points: float) -> str:
    """The change in points, with its interval on the same images where there is one."""
    wanted = (summary["classes"], "no_sae")
    found = next((row for row in summary["paired"] or [] if (row["classes"], row["tried"]) == wanted), None)
    if found is None or math.isnan(found["low"]):
        return f"{points:+.2f} points"
    return f"{found['change']:+.2f} points, {found['low']:+.2f} to {found['high']:+.2f} on the same images"


def paired_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """For MLflow: paired_{all, base or novel}_{no_sae or reconstruction}, with _low and _high; without what is not defined."""
    rows = summary["paired"] or []
    found = {f"paired_{row['classes']}_{row['tried']}{end}": row[key] for row in rows for end, key in _ENDS.items()}
    return {name: value for name, value in found.items() if value is not None}
