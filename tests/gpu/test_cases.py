"""The cases that `make gpu` runs on a GPU, here on the CPU, on a pretended GPU, and on a real one where there is one."""

import contextlib
from collections.abc import Callable

import pytest
import torch

from tests.gpu import operations, tower, training
from tests.gpu.figures import Figure, apart, unequal
from tests.gpu.pretend import pretended_cuda

CASES = [case for module in (operations, training, tower) for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.__name__))
@pytest.mark.parametrize("where", ["cpu", "pretended", "cuda"])
def test_case(case: Callable[[str], list[Figure]], where: str) -> None:
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if where == "pretended" and torch.cuda.is_available():
        pytest.skip("there is a real one")
    torch.compiler.reset()
    with pretended_cuda() if where == "pretended" else contextlib.nullcontext():
        figures = case("cpu" if where == "cpu" else "cuda")
    assert not [figure for figure in figures if not figure.passed]


def test_figures_that_differ_do_not_pass() -> None:
    x = torch.arange(1.0, 5.0)
    assert apart("x", x, x, 1e-6).passed
    assert not apart("x", x + 1e-3, x, 1e-6).passed
    assert not apart("x", x[:3], x, 1e-6).passed
    assert not apart("x", x * torch.nan, x, 1e-6).passed
    assert unequal("x", x * torch.nan, x * torch.nan).passed
    assert unequal("x", torch.tensor([1, 2, 3, 5]), torch.tensor([1, 2, 3, 4])).found == pytest.approx(0.25)


class TestPretended:
    def test_operands_on_two_devices_are_an_error(self) -> None:
        with pretended_cuda():
            there, here = torch.ones(3, device="cuda"), torch.ones(3)
            for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there > 0]):
                with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
                    mixed()
            with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
                there.numpy()

    def test_what_a_gpu_takes_from_the_cpu(self) -> None:
        with pretended_cuda():
            there = torch.arange(6.0, device="cuda").view(2, 3)
            assert there[torch.tensor([1])].is_cuda
            assert (there * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
            assert there.sum().item() == 15
            assert not there.cpu().is_cuda
            assert torch.zeros(2).to("cuda").copy_(torch.ones(2)).device == torch.device("cuda", 0)
            assert torch.nn.Linear(3, 2).to("cuda")(there).is_cuda
        assert not torch.zeros(2).is_cuda

    def test_gradients_stay_there(self) -> None:
        with pretended_cuda():
            leaf = torch.ones(3, device="cuda", requires_grad=True)
            (gradient,) = torch.autograd.grad((leaf**2).sum(), leaf)
            assert gradient.is_cuda
            assert gradient.tolist() == [2, 2, 2]
