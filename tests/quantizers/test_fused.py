"""LSQ in loops of Inductor's own, as GPUs take it, made for the processor here: against PyTorch's operators."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.quantizers import QuantSpec, build, fused, graph, native
from fewbits.quantizers.learned_step import lsq
from fewbits.recipes import make
from fewbits.training import Settings
from fewbits.training.setup import remarks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    looked_at = fused.reason
    torch._dynamo.reset()
    looked_at.cache_clear()
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(native, "serves", lambda *_: False)
    yield
    looked_at.cache_clear()
    torch._dynamo.reset()


def passed(x: Tensor, step: Tensor, low: Any, high: Any, grad: Tensor) -> list[Tensor]:
    x, step = x.detach().requires_grad_(), step.clone().requires_grad_()
    y = lsq(x, step, low, high, 0.01)
    return [y.detach(), *torch.autograd.grad(y, (x, step), grad)]


CASES: list[tuple[tuple[int, ...], tuple[int, ...], Any, Any]] = [
    ((2, 3, 8, 8), (), 0, 15),
    ((5, 7), (1,), -8, 7),
    ((6, 3, 3, 3), (6, 1, 1, 1), -2, 1),
    ((2, 3, 40, 40), (), torch.tensor(-3.0), torch.tensor(12.0)),
    ((3,), (3,), -2, 1),
]


def test_what_operators_give_whatever_the_shape(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    assert fused.reason(torch.device("cpu")) == ""
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for layout in ("contiguous", "channels-last", "strided"):
        for shape, step_shape, low, high in CASES:
            x, grad, step = 2 * torch.randn(shape), torch.randn(shape), torch.rand(step_shape) + 0.1
            x.view(-1)[::3] = (x.view(-1)[::3] / 0.15).round() * 0.15
            if layout == "channels-last" and x.ndim == 4:
                x = x.to(memory_format=torch.channels_last)
            if layout == "strided":
                x = x.repeat_interleave(2, -1)[..., ::2]
            found = passed(x, step, low, high, grad)
            with monkeypatch.context() as patch:
                patch.setattr(fused, "serves", lambda *_: False)
                wanted = passed(x, step, low, high, grad)
            for one, other in zip(found[:2], wanted[:2], strict=True):
                assert torch.equal(one, other), (layout, shape)
                assert one.stride() == other.stride()
            torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-5)
    # What the first look made serves all shapes and bits, but that sums of long rows may be split.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= compiled + 2


def test_a_gate_is_read_on_the_device(monkeypatch: pytest.MonkeyPatch):
    quantizer = build(QuantSpec("lsq", 4, "activation"), 3, 1)
    x = torch.rand(2, 3, 8, 8)
    quantizer.calibrate(x)
    monkeypatch.setattr(type(quantizer), "_reads_buffers", lambda self: False)
    for is_open in (True, False):
        quantizer.enabled.fill_(is_open)
        given = x.clone().requires_grad_()
        y = quantizer(given)
        y.sum().backward()
        assert torch.equal(y, quantizer.fake_quantize(x) if is_open else x)
        assert given.grad is not None
        assert bool((given.grad == 1).all()) != (is_open and bool((x > quantizer.step * 15).any()))
        assert quantizer.step.grad is not None
        assert bool(quantizer.step.grad != 0) == is_open
        quantizer.zero_grad()


def test_a_gradient_s_gradient_behind_a_gate():
    x, step = torch.randn(4, 5, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    (grad,) = torch.autograd.grad((lsq(x, step, -2, 3) ** 2).sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), step)[0] != 0


def test_what_a_run_does_in_turn_compiles_little():
    """Training in bf16, evaluation without gradients, in float32 and back."""
    assert fused.reason(torch.device("cpu")) == ""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    x, step = torch.randn(2, 3, 8, 8), torch.tensor(0.3, requires_grad=True)
    for _ in range(2):
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                lsq(x, step, 0, 3).sum().backward()
                with torch.no_grad():
                    lsq(x, step, 0, 3)
                with torch.inference_mode():
                    lsq(x.clone(), step, 0, 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= before + 1  # inference mode's


def test_bfloat16_is_computed_in_float32():
    x, step = torch.randn(2, 3, 8, 8).bfloat16(), torch.tensor(0.3)
    y = fused.lsq(x, step, -8, 7)
    assert torch.equal(y, graph.lsq(x.float(), step, -8, 7))
    grad_x, _ = fused.lsq_backward(x, y, step, -8, 7, 1.0)
    assert grad_x.dtype == torch.bfloat16


@pytest.mark.parametrize("fault", ["dies", "computes something else"])
def test_a_compiler_that_cannot_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        if fault == "dies":
            raise RuntimeError("no Triton today\nand a long story")
        return torch.zeros(())

    monkeypatch.setattr(fused, "_compiled", lambda function: broken)
    assert not fused.serves(torch.ones(3))
    assert lsq(torch.tensor([-1.0, 0.3, 5.0]), torch.tensor(0.5), 0, 3).tolist() == [0.0, 0.5, 1.5]
    if fault == "dies":
        assert fused.reason(torch.device("cpu")).startswith("no Triton today")
        monkeypatch.setattr(fused, "DEVICES", ("xpu",))
        monkeypatch.setattr(fused, "reason", lambda device: "no Triton today\nand a long story")
        (said,) = remarks(Settings(), torch.nn.ReLU(), torch.device("xpu"), make("plain"))
        assert said.endswith("slower: no Triton today")
