"""Jobs that go on in the background while a test kills things."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, RayHead


def start(
    ray_head: RayHead, ready_mlflow: Path, folder: Path, root: str, *flags: str, job: str = "extract"
) -> "subprocess.Popen[str]":
    """A job that goes on in the background, its output and its MLflow store in files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(ready_mlflow, folder / "mlflow.db")
    environment = {
        **ray_head.environment, "RAY_ADDRESS": ray_head.address, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--root_dir", root, *flags]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err, text=True)


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def pids(title: str) -> list[int]:
    """Processes whose command line begins with `title`, as Ray names its workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(title.encode()):
                found.append(int(folder.name))
    return found
