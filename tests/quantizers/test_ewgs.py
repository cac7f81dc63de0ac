import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbits.quantizers import Quantizer, QuantSpec, build

F = np.float32
LOWER, UPPER, SCALE = -0.75, 1.25, -0.5  # exact in float32; |s| counts


def make(bits: int, role: str, delta: float = 0.25, start: str = "data") -> Quantizer:
    quantizer = build(QuantSpec("ewgs", bits, role, start=start), 3, 0 if role == "weight" else 1)
    with torch.no_grad():
        quantizer.get_parameter("lower").fill_(LOWER)
        quantizer.get_parameter("upper").fill_(UPPER)
        quantizer.get_buffer("delta").fill_(delta)
        if role == "weight":
            quantizer.get_parameter("output_scale").fill_(SCALE)
    return quantizer


def slow_ewgs(x: Tensor, g: Tensor, bits: int, role: str, delta: float) -> tuple[list[float], list[float], list[float]]:
    """Values, gradients of the values, gradients of lower, upper and scale."""
    n = F(2**bits - 1)
    width = F(UPPER) - F(LOWER)
    step = width / n
    values, grads, learned = [], [], [0.0, 0.0, 0.0]
    for v, grad in zip(x.detach().numpy().ravel(), g.numpy().ravel(), strict=True):
        code = min(max(np.rint((v - F(LOWER)) / step), F(0)), n)
        x_n, x_q = min(max(float(v) - LOWER, 0) / float(width), 1), float(code) / float(n)
        if role == "weight":
            magnitude = F(abs(SCALE))
            values.append(float(code * (magnitude * F(2 / (2**bits - 1))) - magnitude))
            g_q = float(grad) * 2 * abs(SCALE)  # output |s| (2 x_q - 1)
            learned[2] += float(grad) * (2 * x_q - 1) * math.copysign(1, SCALE)
        else:
            values.append(float(code * F(1 / (2**bits - 1))))
            g_q = float(grad)
        g_n = g_q * (1 + delta * math.copysign(1, g_q) * (x_n - x_q))
        inside = LOWER <= v <= UPPER
        grads.append(g_n / float(width) if inside else 0.0)
        learned[0] += -g_n * (1 - x_n) / float(width) if inside else 0.0
        learned[1] += -g_n * x_n / float(width) if inside else 0.0
    return values, grads, learned


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.25])
@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_by_loops(bits: int, role: str, delta: float):
    step = (UPPER - LOWER) / (2**bits - 1)
    halves = LOWER + torch.arange(-2, 2 * 2**bits + 1) * (step / 2)
    x = torch.cat([2 * torch.randn(80), halves, torch.tensor([LOWER, UPPER, 1e6, -1e6])]).requires_grad_()
    g = torch.randn_like(x)
    quantizer = make(bits, role, delta)
    y = quantizer(x)
    y.backward(g)
    values, grads, learned = slow_ewgs(x, g, bits, role, delta)
    assert y.tolist() == values
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(grads), rtol=1e-5, atol=1e-5)
    for name, slow in zip(("lower", "upper", "output_scale"), learned, strict=True):
        if name != "output_scale" or role == "weight":
            grad = quantizer.get_parameter(name).grad
            assert grad is not None
            assert grad.item() == pytest.approx(slow, rel=1e-4, abs=1e-3), name


def test_zero_delta_is_straight_through():
    x = torch.tensor([-0.5, 0.1, 0.9], requires_grad=True)
    make(2, "activation", delta=0.0)(x).backward(torch.tensor([1.0, -2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, -1.0, 1.5]  # g / (u - l)


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_clipped_elements_move_neither_end(role: str):
    """Unlike PACT and LSQ."""
    x = torch.tensor([-5.0, -0.76, 1.26, 40.0], requires_grad=True)
    quantizer = make(2, role)
    quantizer(x).backward(torch.randn(4))
    for grad in (x.grad, quantizer.get_parameter("lower").grad, quantizer.get_parameter("upper").grad):
        assert grad is not None
        assert not grad.any()


def test_default_delta_is_that_of_the_authors_scripts():
    fresh = build(QuantSpec("ewgs", 2, "weight"), 3, 0)
    assert fresh.get_buffer("delta").item() == F(1e-3)
    assert "delta" in fresh.state_dict()  # a resumed run equals an uninterrupted one


def test_one_bit_activations_are_zero_and_one():
    assert make(1, "activation")(torch.randn(50)).unique().tolist() == [0.0, 1.0]


def test_an_empty_interval_is_kept_open():
    quantizer = make(4, "activation")
    torch.nn.init.constant_(quantizer.get_parameter("upper"), LOWER - 1)
    y = quantizer(torch.randn(50))
    assert bool(torch.isfinite(y).all())


def test_start_of_the_paper():
    w, x = torch.randn(8, 30) * 0.3, torch.randn(8, 3, 4, 4)
    weight, activation = make(2, "weight", start="paper"), make(2, "activation", start="paper")
    weight.calibrate(w)
    activation.calibrate(x)
    assert weight.get_parameter("upper").item() == pytest.approx(3 * float(w.std()), rel=1e-5)
    assert weight.get_parameter("lower").item() == -weight.get_parameter("upper").item()
    assert activation.get_parameter("lower").item() == float(x.min())
    spread = 3 * float(x.std()) / math.sqrt(1 - 2 / math.pi)
    assert activation.get_parameter("upper").item() == pytest.approx(spread, rel=1e-5)


def test_our_start_keeps_the_lower_end_at_the_minimum():
    x = torch.randn(8, 3, 4, 4)
    quantizer = make(2, "activation")
    quantizer.calibrate(x)
    assert quantizer.get_parameter("lower").item() == float(x.min())
