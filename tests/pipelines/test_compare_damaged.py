"""A run's files that are damaged are named, with the job that makes them anew: no Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.compare_runs import read_run
from patchsae_ray.pipelines.extract import COUNTS_FILE
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.tables import npy_bytes

COUNTS = np.arange(6.0).reshape(3, 2)
ROW = {part: {"percent": 50.0, "low": None, "high": None} for part in ("mean_over_classes", "base", "novel")}
RANKING = {"table": "metrics.csv", "settings": {"on_1": ROW, "off_1": ROW}}
SUMMARY: dict[str, Any] = {"images": 4, "no_sae": ROW, "rankings": {"class": RANKING}}
TABLE = "masking,0,1\nno_sae,50,25\non_1,50,25\n"
HALVES = "ranking,masking,0,1\nclass,no_sae,50,25\nrandom,no_sae,1,1\n"


def finish(uri: str, job: str, identity: dict[str, Any], files: dict[str, bytes]) -> ResultFolder:
    folder = ResultFolder(uri, job, identity, dict.fromkeys(files, run_key(identity)))
    folder.check(False)
    for name, data in files.items():
        folder.write(name, data)
    folder.commit({"summary": {}})
    return folder


@pytest.fixture
def steered(tmp_path: Path) -> Path:
    """The folder of a steering run that can be compared, its counts beside it."""
    finish(f"{tmp_path}/out/feature_data/base/many", "extract", {"job": "extract"}, {COUNTS_FILE: npy_bytes(COUNTS)})
    files = {"summary.json": json.dumps(SUMMARY), "metrics.csv": TABLE, "metrics_halves.csv": HALVES}
    identity = {"counts": storage.digest([COUNTS])}
    uri = f"{tmp_path}/eval_outputs/base/many"
    finish(uri, "steer", identity, {name: text.encode() for name, text in files.items()})
    return Path(uri)


def test_a_whole_run_is_read_and_a_table_is_a_name_not_a_path(tmp_path: Path, steered: Path) -> None:
    elsewhere = {**SUMMARY, "rankings": {"class": {**RANKING, "table": "/etc/../elsewhere/metrics.csv"}}}
    (steered / "summary.json").write_text(json.dumps(elsewhere))
    run = read_run(str(tmp_path), "base", "many")
    assert run.metrics["1"].tolist() == [25, 25]
    assert run.halves["0"].tolist() == [50]


DAMAGE: dict[str, tuple[str, Callable[[str], str]]] = {
    "a summary cut short": ("summary.json", lambda text: text[:20]),
    "a summary that is a list": ("summary.json", lambda text: "[]"),
    "a summary without rankings": ("summary.json", lambda text: text.replace("rankings", "others")),
    "a summary without images": ("summary.json", lambda text: text.replace("images", "others")),
    "a ranking that is no mapping": ("summary.json", lambda text: json.dumps({**SUMMARY, "rankings": {"class": 3}})),
    "a table that is no name": ("summary.json", lambda text: text.replace('"metrics.csv"', "3")),
    "settings of another name": ("summary.json", lambda text: text.replace("on_1", "on-1")),
    "no percent": ("summary.json", lambda text: text.replace("percent", "share")),
    "an empty table": ("metrics.csv", lambda text: ""),
    "a table without rows": ("metrics.csv", lambda text: text.splitlines()[0] + "\n"),
    "a table cut short": ("metrics.csv", lambda text: text[:9]),
    "a table of words": ("metrics.csv", lambda text: text.replace("25", "words")),
    "halves without rankings": ("metrics_halves.csv", lambda text: text.replace("ranking,", "others,")),
    "halves of other rankings": ("metrics_halves.csv", lambda text: text.replace("class", "image")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_cure(tmp_path: Path, steered: Path, damage: str) -> None:
    name, change = DAMAGE[damage]
    (steered / name).write_text(change((steered / name).read_text()))
    with pytest.raises(UserError) as caught:
        read_run(str(tmp_path), "base", "many")
    assert str(caught.value) == f"{steered / name} is damaged; jobs/steer.py --overwrite makes it anew"


def test_a_finished_run_says_when_and_where(steered: Path) -> None:
    identity = {"counts": storage.digest([COUNTS])}
    folder = ResultFolder(str(steered), "steer", identity, {"summary.json": run_key(identity)})
    assert folder.done()
    assert folder.describe_done().startswith("already finished (run.json of 2")
    assert folder.describe_done().endswith(f"); results in {steered}")
