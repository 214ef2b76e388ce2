"""Steering's tables and a comparison's paired intervals, from totals made by hand: no Ray."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from patchsae_ray.errors import UserError
from patchsae_ray.figures import masking_curve
from patchsae_ray.measure.masking import MaskingAccuracy
from patchsae_ray.measure.outcomes import Outcomes
from patchsae_ray.measure.rankings import Ranking
from patchsae_ray.measure.steering import SteeringSettings
from patchsae_ray.measure.steering_totals import SteeringTotals
from patchsae_ray.pipelines.compare_page import _paired as paired_on_the_page
from patchsae_ray.pipelines.compare_paired import change_in_words, paired_metrics, paired_table
from patchsae_ray.pipelines.compare_runs import ModelRun
from patchsae_ray.pipelines.steer_outputs import outcomes_parquet, output_names, steering_metrics, summarise, with_interval

NUM_IMAGES, CLASSES = 60, 4


def model_run(folder: Path, name: str, right: np.ndarray, labels: np.ndarray, measured: np.ndarray) -> ModelRun:
    """Of a run that wrote outcomes alone; right [N, 4]."""
    outcomes = Outcomes(4)
    outcomes.update(np.flatnonzero(measured), labels[measured], right[measured])
    (folder / f"{name}.parquet").write_bytes(outcomes_parquet(outcomes, len(labels)))
    counts, nothing = np.zeros((3, CLASSES)), pd.DataFrame()
    return ModelRun(name, counts, {}, {}, {}, nothing, nothing, None, str(folder / f"{name}.parquet"))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[ModelRun, ModelRun, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, NUM_IMAGES)
    right = rng.random((2, NUM_IMAGES, 4)) < 0.6
    measured = np.ones((2, NUM_IMAGES), bool)
    measured[0, 7], measured[1, 30] = False, False
    base, adapted = (
        model_run(tmp_path, name, *given)
        for name, *given in (("base", right[0], labels, measured[0]), ("maple", right[1], labels, measured[1]))
    )
    return base, adapted, right[:, measured.all(axis=0)], labels[measured.all(axis=0)]


def test_the_change_is_that_of_the_same_images(runs: tuple[ModelRun, ModelRun, np.ndarray, np.ndarray]) -> None:
    base, adapted, right, labels = runs
    table = paired_table(base, adapted)
    assert table[["classes", "tried"]].to_numpy().tolist() == [
        [part, tried] for part in ("all", "base", "novel") for tried in ("no_sae", "reconstruction")
    ]
    columns = {("all", "no_sae"): 0, ("all", "reconstruction"): 2, ("novel", "no_sae"): 1, ("novel", "reconstruction"): 3}
    for (part, tried), column in columns.items():
        row = table[(table["classes"] == part) & (table["tried"] == tried)].iloc[0]
        inside = labels >= (0 if part == "all" else 2)
        change = right[1, :, column].astype(float) - right[0, :, column]
        wanted = np.mean([change[labels == label].mean() for label in range(CLASSES) if inside[labels == label].all()])
        assert row["images"] == inside.sum()
        assert row["change"] == pytest.approx(100 * wanted, abs=1e-4)
        assert row["low"] < row["change"] < row["high"]
        assert (row["gained"], row["lost"]) == ((change[inside] > 0).sum(), (change[inside] < 0).sum())
    summary: dict[str, Any] = {"classes": "novel", "paired": table.to_dict("records")}
    novel = summary["paired"][4]
    assert change_in_words(summary, 99.0) == (
        f"{novel['change']:+.2f} points, {novel['low']:+.2f} to {novel['high']:+.2f} on the same images"
    )
    assert paired_metrics(summary)["paired_novel_no_sae_low"] == novel["low"]
    shown = "".join(paired_on_the_page(summary))
    assert f"{novel['change']:+.2f} ({novel['low']:+.2f} to {novel['high']:+.2f})" in shown
    json.dumps(summary["paired"], allow_nan=False)


def test_runs_without_outcomes_say_so(runs: tuple[ModelRun, ModelRun, np.ndarray, np.ndarray]) -> None:
    base, adapted, _, _ = runs
    table = paired_table(replace(base, outcomes=None), adapted)
    assert table.empty
    summary: dict[str, Any] = {"classes": "all", "paired": None}
    assert change_in_words(summary, -1.25) == "-1.25 points"
    assert paired_metrics(summary) == {}
    assert "made without outcomes.parquet" in "".join(paired_on_the_page(summary))


def test_outcomes_of_other_images_are_refused(runs: tuple[ModelRun, ModelRun, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    base, _, _, _ = runs
    (tmp_path / "other").mkdir()
    for labels in (np.full(NUM_IMAGES, 3), np.zeros(NUM_IMAGES - 1, dtype=np.int64)):
        other = model_run(tmp_path / "other", "maple", np.ones((len(labels), 4), bool), labels, np.ones(len(labels), bool))
        with pytest.raises(UserError, match="are not of the same images"):
            paired_table(base, other)
    (tmp_path / "other" / "maple.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"maple.parquet is no whole Parquet file"):
        paired_table(base, other)


@dataclass(frozen=True)
class SomeImages:
    """As much of a manifest as a summary takes."""

    num_classes: int


def test_one_image_a_class_has_no_interval() -> None:
    steering = SteeringSettings((1, 3), (Ranking("class"),), "all", "none", 0.0, False)
    totals = SteeringTotals()
    for kept in (totals.accuracy, totals.in_half):
        kept["class"] = MaskingAccuracy(4, 3)
        kept["class"].update(np.arange(3), np.array([True, True, False]), np.ones((3, 4, 1), bool))
    summary, curves = summarise(totals, steering, SomeImages(3))  # type: ignore[arg-type]
    found = summary["no_sae"]["mean_over_classes"]
    assert found == {"percent": 66.666667, "low": None, "high": None}
    json.dumps(summary, allow_nan=False)
    assert with_interval(summary["no_sae"]) == " 66.67 % (no interval: one image a class)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert masking_curve(steering.ks, steering.rankings, curves, 3).startswith(b"\x89PNG")
    metrics = steering_metrics(summary)
    assert metrics["accuracy_no_sae"] == 66.666667
    assert "accuracy_no_sae_low" not in metrics
    assert "outcomes.parquet" in output_names(steering)
