"""What every command does before its job begins."""

from pathlib import Path

import pytest

from patchsae_ray.cli import run_job
from patchsae_ray.settings import RunSettings


@pytest.mark.parametrize("flags", [[], ["--root_dir", "./"], ["--root_dir", "results"]])
def test_a_submitted_job_does_not_write_into_its_temporary_folder(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run_job(RunSettings, lambda settings: pytest.fail("it ran"), flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --root_dir")
    assert "temporary; a URI, or the full path" in error
    assert error.count("\n") == 1


def test_elsewhere_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    assert run_job(RunSettings, lambda settings: ran.append(settings.root_dir), []) == 0
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for root in (str(tmp_path), "s3://bucket/root"):
        assert run_job(RunSettings, lambda settings: ran.append(settings.root_dir), ["--root_dir", root]) == 0
    assert ran == [".", str(tmp_path), "s3://bucket/root"]
