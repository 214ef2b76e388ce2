"""What a job's work is told of its folder; the cluster and MLflow are stand-ins."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from patchsae_ray.pipelines import runner
from patchsae_ray.pipelines.results import ResultFolder, run_key
from patchsae_ray.pipelines.runner import Made, Session, run_once


@contextmanager
def no_tracking(*given: Any) -> Iterator[Any]:
    yield SimpleNamespace(run_id="", **dict.fromkeys(("tags", "metrics", "files"), lambda *told: None))


@pytest.mark.parametrize("finished", [True, False])
def test_the_work_is_told_whether_the_same_run_was_finished(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "tracked", no_tracking)
    monkeypatch.setattr(runner, "as_dict", lambda settings: {})
    key = run_key({"threshold": 0.2})
    if finished:
        earlier = ResultFolder(str(tmp_path), "extract", {"threshold": 0.2}, {"a.bin": key})
        earlier.write("a.bin", b"1")
        earlier.commit({"summary": {}})
    folder = ResultFolder(str(tmp_path), "extract", {"threshold": 0.2}, {"a.bin": key})
    told: list[bool] = []

    def work(session: Session) -> Made:
        told.append(session.anew)
        return Made({"a.bin": b"2"}, {"n": 1.0}, {}, {})

    settings: Any = SimpleNamespace(root_dir=str(tmp_path), overwrite=True)
    plan: Any = SimpleNamespace(precision="fp32", device="cpu", describe=lambda: "")
    assert run_once(settings, {"fp32": folder}, work, lambda _: plan, repeats=True) == {"n": 1.0}
    assert told == [finished]
