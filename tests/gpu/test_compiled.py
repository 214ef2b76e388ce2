"""What is compiled on a GPU, compiled by inductor for the CPU; and what happens where it cannot be."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.measure.compiling import Compiled
from patchsae_ray.measure.residuals import ResidualBatches
from patchsae_ray.measure.stages import StageTimer
from tests.gpu.pretend import pretended_cuda

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = (str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors"))
MAPLE = {"vit_type": "maple", "model_path": str(GOLDEN / "model.pth.tar-5"), "config_path": str(GOLDEN / "maple.yaml")}
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The package's own lines of the log."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("patchsae_ray")]


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("adapter", "block_layer"), [({}, 0), (MAPLE, 1)], ids=["base", "maple"])
def test_the_tower_compiles_under_inference_mode(
    adapter: dict[str, Any], block_layer: int, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = load_backbone(*CLIP, block_layer, **adapter)
    compiled = Compiled(backbone.to_hook, "the vision tower")
    scalar_code = torch._inductor.config.patch(
        {"cpp.simdlen": 1, "compile_threads": 1}
    )  # looks for no vector unit: seconds less
    with torch.inference_mode(), scalar_code:
        for _ in range(2):
            found, expected = compiled(pixels(8)), backbone.to_hook(pixels(8))
            assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["fxgraph_cache_miss"] + counters["fxgraph_cache_hit"] > 0, "inductor was not at work"
    assert not said(caplog)


def failing_backend(graph: Any, inputs: Any) -> Callable[..., Any]:
    raise ModuleNotFoundError("No module named 'setuptools'")


def test_where_compiling_fails_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=failing_backend))
    backbone = load_backbone(*CLIP)
    compiled = Compiled(backbone.to_hook, "the vision tower")
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(pixels(3)), backbone.to_hook(pixels(3)))
        assert torch.equal(compiled(pixels(2)), backbone.to_hook(pixels(2)))
    assert said(caplog) == [
        "the vision tower runs without being compiled, more slowly: ModuleNotFoundError: No module named 'setuptools'"
    ]


def test_an_error_of_the_function_itself_is_raised(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = Compiled(load_backbone(*CLIP).to_hook, "the vision tower")
    with pytest.raises(ValueError, match=r"pixels of torch\.float32"):
        compiled(torch.rand(2, 32, 32, 3))
    assert not said(caplog)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_batches_on_a_pretended_gpu_are_the_cpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    backbone, unit = load_backbone(*CLIP), pixels(count).numpy()
    expected = [(rows, x.clone()) for rows, x in ResidualBatches(backbone, 4, "cpu").of(unit, StageTimer("cpu"))]
    with pretended_cuda(), torch.inference_mode():
        found = list(ResidualBatches(backbone.to("cuda"), 4, "cuda").of(unit, StageTimer("cuda")))
    assert [rows for rows, _ in found] == [rows for rows, _ in expected]
    for (_, ours), (_, plain) in zip(found, expected, strict=True):
        assert ours.is_cuda or type(ours) is not Tensor
        assert torch.allclose(ours.as_subclass(Tensor), plain, atol=1e-5)
