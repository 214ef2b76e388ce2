"""The list of the package's branches for a GPU is whole, and each is covered by cases that exist."""

import ast

import pytest

from tests.gpu import operations, tower, training
from tests.gpu.branches import BRANCHES, PACKAGE, PLANS, ROOT, _in_file, find

CASES = {
    f"{module.__name__.rpartition('.')[2]}.{case.__name__}" for module in (operations, training, tower) for case in module.CASES
}


def test_every_branch_is_listed() -> None:
    missing = [where for where in find() if where not in BRANCHES]
    assert not missing, (
        f"write a case in tests/gpu that takes these branches, and list them in tests/gpu/branches.py: {missing}"
    )


def test_every_entry_is_still_there() -> None:
    assert sorted(BRANCHES) == [where for where in find() if where in BRANCHES]
    assert all((PACKAGE / name).is_file() for name in PLANS)
    assert (ROOT / "tests" / "pipelines").is_dir()


def test_what_is_compiled_is_what_test_compiled_compiles() -> None:
    calls = [
        (path.relative_to(PACKAGE).as_posix(), ast.unparse(node))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.compile", "torch.jit.script", "Compiled")
    ]
    assert calls == [
        ("measure/compiling.py", "torch.compile(self._function, dynamic=False)"),
        ("measure/residuals.py", "Compiled(backbone.to_hook, 'the vision tower')"),
    ]


def test_every_case_of_the_list_exists() -> None:
    assert {case for cases in BRANCHES.values() for case in cases} <= CASES


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('SIZES = {"cpu": 1, "cuda": 2}', ["SIZES"]),
        ("def f(x):\n    return 1 if x.is_cuda else 2", ["f"]),
        ("class A:\n    def f(self):\n        torch.cuda.synchronize()", ["A.f"]),
        ("def f(x):\n    return x.pin_memory()", ["f"]),
        ('def f():\n    return TorchConfig(backend="nccl")', ["f"]),
        ('def f(device):\n    """cpu or cuda."""\n    return device', []),
    ],
)
def test_what_counts_as_a_branch(source: str, found: list[str]) -> None:
    assert list(_in_file(ast.parse(source))) == found
