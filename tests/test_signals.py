"""SIGTERM is an interrupt with an exit code of its own, and the process ends whatever it waits for."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from patchsae_ray import signals
from patchsae_ray.cli import run_job
from patchsae_ray.settings import FolderSettings
from tests.pipelines.commands import wait_for

JOB = """
import sys, time
from pathlib import Path
from patchsae_ray import signals
from patchsae_ray.cli import run_job
from patchsae_ray.settings import FolderSettings

folder = Path(sys.argv[1])
signals.LAST_SECONDS = float(sys.argv[2])


def run(settings):
    with signals.on_sigterm(lambda: (folder / "told").touch()):
        (folder / "started").touch()
        try:
            time.sleep(1000)
        finally:
            while not (folder / "told").exists():  # by another thread, while this one unwinds
                time.sleep(0.01)
            {unwinding}


sys.exit(run_job(FolderSettings, run, []))
"""


@pytest.mark.parametrize(
    ("unwinding", "last_seconds", "said"),
    [
        ("pass", 1000.0, "terminated\n"),
        ("raise ValueError('generator already executing')", 1000.0, "terminated\n"),
        ("time.sleep(1000)", 0.2, ""),
    ],
)
def test_sigterm_ends_a_job(tmp_path: Path, unwinding: str, last_seconds: float, said: str) -> None:
    command = [sys.executable, "-c", JOB.replace("{unwinding}", unwinding), str(tmp_path), str(last_seconds)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        wait_for((tmp_path / "started").exists)
        job.send_signal(signal.SIGTERM)
        _, error = job.communicate(timeout=60)
    assert job.returncode == 143
    assert error == said
    assert (tmp_path / "told").exists()


def test_the_handler_that_ray_sets_while_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    def run(settings: FolderSettings) -> None:
        with signals.handler_kept():
            ours = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        assert signal.getsignal(signal.SIGTERM) is ours
        sys.exit(signal.SIGTERM)  # as Ray's does

    before = signal.getsignal(signal.SIGTERM)
    assert run_job(FolderSettings, run, []) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_job_rays_handler_stays() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with signals.handler_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
