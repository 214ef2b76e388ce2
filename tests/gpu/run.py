"""Everything that only a GPU shows: the cases of this folder, then the benchmarks that need no Ray.

    python tests/gpu/run.py [--only cases|benchmarks]

Runs with torch and what it finds beside it, from the folder that it lies in, installed or not: the operations and training
need numpy and safetensors; the vision tower and the passes also fsspec, pyyaml, pillow, pyarrow, pandas, open_clip_torch and
ftfy. No Ray, MLflow or pytest. What is missing is said, and what wants it is not run. The end is one table and one JSON line.

Exit codes: 0 where all passed, 1 where something failed or could not be run, 3 where there is no GPU.
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

MODULES = {
    "operations": ("numpy", "safetensors"),
    "training": ("numpy", "safetensors"),
    "tower": ("numpy", "safetensors", "fsspec", "yaml", "PIL", "pyarrow", "pandas", "open_clip", "ftfy"),
}
"""Of this folder → what it imports beside torch."""
BENCHMARKS = {"paths": ("numpy",), "train": ("numpy",), "extract": MODULES["tower"], "steer": MODULES["tower"]}
"""Of tests/benchmarks → likewise."""
BENCHMARK_SECONDS = 300
NO_GPU = 3


@dataclass
class Outcome:
    """One row of the table."""

    name: str
    state: str
    """passed, failed or not run."""
    seconds: float = 0.0
    said: str = ""
    """The figure nearest to its bound, or what went wrong."""
    found: dict[str, Any] = field(default_factory=dict)
    """A benchmark's JSON object."""


def missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def gpu_reason() -> str:
    """Why there is no GPU to run on; empty where there is one."""
    if missing(("torch",)):
        return f"torch is not installed for {sys.executable}"
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds none"


def run_case(name: str, case: Callable[[str], list[Any]]) -> Outcome:
    """A case on the GPU; whatever it raises is its failure."""
    import torch

    torch.compiler.reset()
    started = time.perf_counter()
    try:
        figures = case("cuda")
        torch.cuda.synchronize()
    except Exception as error:  # a kernel that is not there, an assertion, memory: the table has it and the next case runs
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
        return Outcome(name, "failed", time.perf_counter() - started, said)
    failed = [figure for figure in figures if not figure.passed]
    for figure in failed:
        print(f"{name}: {figure.name} is {figure.found:.3g}, at most {figure.bound:.3g} would be right", flush=True)
    shown = sorted(failed or figures, key=lambda one: one.found / one.bound if one.bound else one.found)[-1:]
    said = "".join(f"{one.name}: {one.found:.3g} of {one.bound:.3g}" for one in shown)
    state = "failed" if failed else "passed"
    return Outcome(name, state, time.perf_counter() - started, f"{len(figures)} figures; {said}")


def run_cases() -> list[Outcome]:
    outcomes = []
    for module, needs in MODULES.items():
        lacking = missing(needs)
        if lacking:
            outcomes.append(Outcome(module, "not run", said=f"not installed: {', '.join(lacking)}"))
            continue
        for case in importlib.import_module(f"tests.gpu.{module}").CASES:
            outcomes.append(run_case(f"{module}.{case.__name__}", case))
            print(f"{outcomes[-1].name}: {outcomes[-1].state}, {outcomes[-1].seconds:.1f} s", flush=True)
    return outcomes


def run_benchmark(name: str) -> Outcome:
    """A benchmark as a process of its own; its last line is one JSON object."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / f"{name}.py"), "--device", "cuda"]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BENCHMARK_SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return Outcome(f"benchmark {name}", "failed", time.perf_counter() - started, f"over {BENCHMARK_SECONDS} s")
    print(done.stdout, done.stderr, sep="", flush=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        return Outcome(f"benchmark {name}", "failed", seconds, f"exit code {done.returncode}: {lines[-1][:120]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    numbers = {key: value for key, value in found.items() if isinstance(value, float)}
    said = ", ".join(f"{key} {value:.4g}" for key, value in list(numbers.items())[:3]) or json.dumps(found)[:100]
    return Outcome(f"benchmark {name}", "passed", seconds, said, found)


def run_benchmarks() -> list[Outcome]:
    outcomes = []
    for name, needs in BENCHMARKS.items():
        lacking = missing(needs)
        found = Outcome(f"benchmark {name}", "not run", said=f"not installed: {', '.join(lacking)}")
        outcomes.append(found if lacking else run_benchmark(name))
    return outcomes


def show(outcomes: list[Outcome]) -> None:
    width = max(len(one.name) for one in outcomes)
    print()
    for one in outcomes:
        print(f"{one.name:<{width}}  {one.state:<7}  {one.seconds:7.1f} s  {one.said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["cases", "benchmarks"], help="only these")
    options = parser.parse_args()
    reason = gpu_reason()
    if reason:
        print(f"no GPU: {reason}; nothing was run")
        return NO_GPU
    import torch

    outcomes = run_cases() if options.only != "benchmarks" else []
    outcomes += run_benchmarks() if options.only != "cases" else []
    show(outcomes)
    states = [one.state for one in outcomes]
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **{state.replace(" ", "_"): states.count(state) for state in ("passed", "failed", "not run")},
        "rows": [asdict(one) for one in outcomes],
    }
    print(json.dumps(result))
    return 0 if set(states) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
