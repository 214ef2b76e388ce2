"""The script under `make gpu`, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.paths import crossing_of
from tests.gpu import run
from tests.gpu.figures import Figure

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "mlflow", "boto3", "s3fs", "pytest", "hypothesis", "matplotlib", "jsonargparse")
TOWER = ("open_clip", "fsspec", "yaml", "PIL", "pyarrow", "pandas")


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_3(tmp_path: Path) -> None:
    done = python(str(ROOT / "tests" / "gpu" / "run.py"), cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == f"no GPU: torch {torch.__version__} finds none; nothing was run\n"


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "missing", lambda modules: list(modules))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 3
    assert capsys.readouterr().out == f"no GPU: torch is not installed for {sys.executable}; nothing was run\n"


@pytest.mark.parametrize(
    ("modules", "blocked"), [(("tower",), HEAVY), (("operations", "training"), HEAVY + TOWER)], ids=["tower", "latents"]
)
def test_cases_import_no_more_than_they_say(modules: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    lines = [f"sys.modules.update(dict.fromkeys({blocked!r}))", *(f"import tests.gpu.{name}" for name in modules)]
    done = python("-c", "; ".join(["import sys", *lines]))
    assert done.returncode == 0, done.stderr


def test_a_whole_run_with_stand_ins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tests" / "benchmarks").mkdir(parents=True)
    for name, code in (("good", 'print("noise"); print(\'{"speedup": 2.5}\')'), ("bad", "raise SystemExit('no memory')")):
        (tmp_path / "tests" / "benchmarks" / f"{name}.py").write_text(code)

    def fine(device: str) -> list[Figure]:
        return [Figure("difference", 1e-7, 1e-5)]

    def off(device: str) -> list[Figure]:
        return [Figure("difference", 1e-3, 1e-5), Figure("other", 0, 0)]

    def broken(device: str) -> list[Figure]:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    module = type(sys)("stand_ins")
    module.CASES = (fine, off, broken)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests.gpu.stand_ins", module)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "MODULES", {"stand_ins": (), "elsewhere": ("no_such_module",)})
    monkeypatch.setattr(run, "BENCHMARKS", {"good": (), "bad": (), "absent": ("no_such_module",)})
    monkeypatch.setattr(run, "gpu_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: result[key] for key in ("device", "passed", "failed", "not_run")} == {
        "device": "a card", "passed": 2, "failed": 3, "not_run": 2,
    }  # fmt: skip
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["stand_ins.off"]["said"] == "2 figures; difference: 0.001 of 1e-05"
    assert rows["stand_ins.broken"]["said"] == "RuntimeError: CUDA error: an illegal memory access"
    assert rows["elsewhere"]["said"] == "not installed: no_such_module"
    assert rows["benchmark good"]["found"] == {"speedup": 2.5}
    assert rows["benchmark bad"]["said"] == "exit code 1: no memory"


def test_needs_are_the_modules_own() -> None:
    assert set(run.MODULES) == {"operations", "training", "tower"}
    assert all((ROOT / "tests" / "benchmarks" / f"{name}.py").is_file() for name in run.BENCHMARKS)


def test_where_two_paths_cross() -> None:
    assert crossing_of({0.01: 0.5, 0.04: 2.0}) == pytest.approx(0.02)
    assert crossing_of({0.01: 0.5, 0.04: 0.9}) is None
    assert crossing_of({0.01: 1.5, 0.04: 3.0}) is None


def test_the_benchmark_of_paths_runs() -> None:
    sizes = ["--tokens", "64", "--latents", "256", "--repeats", "1"]
    done = python(str(ROOT / "tests" / "benchmarks" / "paths.py"), "--device", "cpu", *sizes)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])["crossing"]) == {"fp32", "bf16"}
