"""Every place of the package that does something else on a GPU, and what shows that it is right.

`find` reads the package's source; a branch that is not in BRANCHES fails the tests, and so does an entry without its branch.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patchsae_ray"
STRINGS = ("cuda", "nccl")
NAMES = ("is_cuda", "cuda", "cudnn", "pin_memory", "Compiled")

BRANCHES: dict[str, tuple[str, ...]] = {
    "backbone/adapter.py:load_backbone": ("tower.residuals",),
    "backbone/clip.py:Backbone.from_hook": ("tower.residuals", "tower.steering"),
    "backbone/clip.py:Backbone.to_hook": ("tower.residuals",),
    "data/mixing.py:TokenBatch.pinned": ("operations.pinned_batches",),
    "measure/evaluator.py:ACTIVE_BYTES": ("tower.evaluation",),
    "measure/matmul.py:matmul_rate": ("operations.timing",),
    "measure/residuals.py:ResidualBatches.__init__": ("tower.residual_batches", "tower.compiling"),
    "measure/residuals.py:ResidualBatches._batches": ("tower.residual_batches",),
    "measure/residuals.py:ResidualBatches._start_copy": ("tower.residual_batches",),
    "measure/stages.py:StageTimer.mark": ("operations.timing",),
    "measure/steering.py:VARIANT_BYTES": ("tower.steering",),
    "pipelines/devices.py:device_name": ("operations.device_names",),
    "pipelines/model.py:PortableModel.build_backbone": ("tower.residuals",),
    "pipelines/train_worker.py:TrainWorker.train": ("operations.pinned_batches",),
    "sae/gradients.py:product": ("training.gradients",),
    "sae/memory.py:PART_BYTES": ("training.peak_memory",),
    "sae/memory.py:part_bytes": ("training.peak_memory", "training.steps"),
    "sae/ops.py:SLICE_BYTES": ("operations.reductions", "training.gradients"),
    "sae/ops.py:_sums_by_type": ("operations.reductions",),
    "sae/ops.py:weighed_sums": ("operations.long_bags", "training.gradients"),
    "sae/trainer.py:SPARSE_BELOW": ("training.steps",),
}
"""`file:function` → cases, `module.function` of this folder, that a machine with a GPU runs."""

PLANS: dict[str, str] = {
    "names.py": "the words of --device",
    "pipelines/cluster.py": "shares of a cluster's GPUs, by what Ray says of them",
    "pipelines/planning.py": "shares of a cluster's GPUs, as pure functions of what it has",
    "pipelines/train_launch.py": "what Ray Train is asked for",
    "pipelines/train_plan.py": "shares of a cluster's GPUs, by what Ray says of them",
}
"""Files whose branches decide, on the driver, what is to run where: no tensor is touched, and tests/pipelines has them."""


def find() -> list[str]:
    """`file:function` of every branch outside PLANS, sorted."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name in PLANS:
            continue
        found.update(f"{name}:{where}" for where in _in_file(ast.parse(path.read_text())))
    return sorted(found)


def _in_file(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if _mentions(inner):
                    yield f"{node.name}.{_name_of(inner)}"
        elif not isinstance(node, ast.Import | ast.ImportFrom) and _mentions(node):
            yield _name_of(node)


def _name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return str(getattr(node, "name", type(node).__name__))


def _mentions(tree: ast.AST) -> bool:
    """Whether code, not its docstrings, speaks of a GPU."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in STRINGS:
            return True
        if isinstance(node, ast.Attribute) and node.attr in NAMES:
            return True
        if isinstance(node, ast.Compare) and any(
            isinstance(one, ast.Constant) and one.value == "cpu" for one in ast.walk(node)
        ):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            return True
    return False
