import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewbits.quantizers import QuantSpec, build
from fewbits.quantizers.learned_step import lsq
from fewbits.quantizers.lsq import LSQActivation, LSQWeight

F = np.float32


def slow_lsq(x: Tensor, step: float, low: int, high: int, g: Tensor) -> tuple[list[float], list[float], float]:
    """Values, gradient of the values, and gradient of the step without its scale, one element at a time."""
    s, values, grads, grad_step = F(step), [], [], 0.0
    for v, grad in zip(x.detach().numpy().ravel(), g.numpy().ravel(), strict=True):
        u = v / s
        code = min(max(np.rint(u), F(low)), F(high))
        values.append(float(code * s))
        inside = low <= u <= high
        grads.append(float(grad) if inside else 0.0)
        slope = np.rint(u) - u if inside else low if u < low else high
        grad_step += float(grad) * float(slope)
    return values, grads, grad_step


def ties(step: float, num: int = 12) -> Tensor:
    """Values exactly at, just below and just above half steps, and at whole ones."""
    halves = torch.arange(-num, num + 1) * (step / 2)
    down, up = (torch.nextafter(halves, torch.tensor(end)) for end in (-math.inf, math.inf))
    return torch.cat([halves, down, up])


def weight(bits: int, granularity: str = "tensor", num: int = 3, start: str = "data") -> LSQWeight:
    quantizer = build(QuantSpec("lsq", bits, "weight", granularity, start), num, 0)
    assert isinstance(quantizer, LSQWeight)
    return quantizer


def activation(bits: int, start: str = "data") -> LSQActivation:
    quantizer = build(QuantSpec("lsq", bits, "activation", start=start), 3, 1)
    assert isinstance(quantizer, LSQActivation)
    return quantizer


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize(
    ("bits", "low", "high"),
    [(1, -1, 1), (2, -2, 1), (3, -4, 3), (4, -8, 7), (5, -16, 15), (6, -32, 31), (7, -64, 63), (8, -127, 127)],
)
def test_weight_grids(bits: int, low: int, high: int):
    """As in the paper, but for one bit (the paper has no level above zero) and for -128, which is left out."""
    codes = weight(bits).encode(torch.linspace(-500, 500, 1001).view(1, -1))
    assert (codes.low, codes.high) == (low, high)
    assert (int(codes.integers.min()), int(codes.integers.max())) == (low, high)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_by_loops(bits: int):
    quantizer = weight(bits)
    torch.nn.init.constant_(quantizer.step, 0.25)
    x = torch.cat([torch.randn(3, 25), ties(0.25).view(3, 25), 50 * torch.randn(3, 4)], 1).requires_grad_()
    g = torch.randn_like(x)
    y = quantizer(x)
    y.backward(g)
    values, grads, grad_step = slow_lsq(x, 0.25, quantizer.low, quantizer.high, g)
    assert y.flatten().tolist() == values
    assert grad_of(x).flatten().tolist() == grads
    scale = 1 / math.sqrt(x.numel() * quantizer.high)
    assert grad_of(quantizer.step).item() == pytest.approx(grad_step * scale, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weight_per_channel_is_a_quantizer_for_each_channel(bits: int):
    x, g = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5)
    together = weight(bits, "channel")
    together.calibrate(x)
    x_together = x.clone().requires_grad_()
    y = together(x_together)
    y.backward(g)
    for c in range(3):
        alone = weight(bits)
        alone.calibrate(x[c : c + 1])
        x_alone = x[c : c + 1].clone().requires_grad_()
        y_alone = alone(x_alone)
        y_alone.backward(g[c : c + 1])
        assert torch.equal(alone.step, together.step[c])
        assert torch.equal(y_alone, y[c : c + 1])
        assert torch.equal(grad_of(x_alone), grad_of(x_together)[c : c + 1])
        # N is the number of weights that share the step
        torch.testing.assert_close(grad_of(alone.step), grad_of(together.step)[c])


def test_one_bit_weight_by_loops():
    quantizer = weight(1)
    x = torch.randn(3, 7)
    x[0, 0] = 0.0
    quantizer.calibrate(x)
    assert quantizer.step.item() == pytest.approx(float(x.abs().mean()))
    x.requires_grad_()
    g = torch.randn_like(x)
    y = quantizer(x)
    y.backward(g)
    signs = [1.0 if v >= 0 else -1.0 for v in x.flatten().tolist()]
    assert y.flatten().tolist() == [sign * quantizer.step.item() for sign in signs]
    assert torch.equal(grad_of(x), g)  # d/dw = 1
    slow = sum(grad * sign for grad, sign in zip(g.flatten().tolist(), signs, strict=True)) / math.sqrt(x.numel())
    assert grad_of(quantizer.step).item() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_activation_by_loops(bits: int, zero_point: int):
    quantizer = activation(bits)
    torch.nn.init.constant_(quantizer.step, 0.25)
    quantizer.zero_point.fill_(zero_point)
    x = torch.cat([torch.randn(3, 25), ties(0.25).view(3, 25), 50 * torch.randn(3, 4)], 1).requires_grad_()
    g = torch.randn_like(x)
    y = quantizer(x)
    y.backward(g)
    values, grads, grad_step = slow_lsq(x, 0.25, -zero_point, 2**bits - 1 - zero_point, g)
    assert y.flatten().tolist() == values
    assert grad_of(x).flatten().tolist() == grads
    features = x.numel() / x.shape[0]  # without the batch
    assert grad_of(quantizer.step).item() == pytest.approx(
        grad_step / math.sqrt(features * (2**bits - 1)), rel=1e-5, abs=1e-6
    )


def test_gradient_scale_does_not_know_the_batch():
    """Twice the same images, each with half the loss: the same gradient."""
    x = torch.randn(4, 3, 5, 5).relu()
    grads = []
    for batch in (x, torch.cat([x, x])):
        quantizer = activation(2)
        quantizer.calibrate(x)
        quantizer(batch).square().sum().div(len(batch)).backward()
        grads.append(grad_of(quantizer.step))
    torch.testing.assert_close(*grads)


@given(st.integers(1, 8), st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30), st.floats(0.125, 2, width=32))
def test_function_by_loops(bits: int, values: list[float], step: float):
    x, s = torch.tensor(values, requires_grad=True), torch.tensor(step, requires_grad=True)
    g = torch.linspace(-1, 2, len(values))
    y = lsq(x, s, -2, 2**bits - 1)
    y.backward(g)
    slow_values, slow_grads, slow_step = slow_lsq(x, step, -2, 2**bits - 1, g)
    assert y.tolist() == slow_values
    assert grad_of(x).tolist() == slow_grads
    assert grad_of(s).item() == pytest.approx(slow_step, rel=1e-4, abs=1e-4)


def test_gradient_of_the_step_agrees_with_autograd():
    """The paper's formula is the straight-through derivative of s * round(clip(v / s))."""
    x, g = torch.randn(200), torch.randn(200)
    fast = torch.tensor(0.4, requires_grad=True)
    lsq(x, fast, -2, 1).backward(g)
    slow = torch.tensor(0.4, requires_grad=True)
    u = (x / slow).clamp(-2, 1)
    ((u.round() - u).detach().add(u) * slow).backward(g)
    torch.testing.assert_close(grad_of(fast), grad_of(slow))


@pytest.mark.parametrize("bits", [2, 4])
def test_start_of_the_paper(bits: int):
    w, x = torch.randn(8, 9), torch.randn(8, 9).relu()
    quantizer = weight(bits, "channel", num=8, start="paper")
    quantizer.calibrate(w)
    torch.testing.assert_close(quantizer.step.data, 2 * w.abs().mean(1) / math.sqrt(2 ** (bits - 1) - 1))
    other = activation(bits, start="paper")
    other.calibrate(x)
    torch.testing.assert_close(other.step.data, 2 * x.mean() / math.sqrt(2**bits - 1))


@pytest.mark.parametrize("bits", [1, 4])
def test_zeros_start_at_one(bits: int):
    quantizer = weight(bits, "channel")
    quantizer.calibrate(torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, -2.0]]))
    assert quantizer.step[0].item() == 1.0
    assert bool((quantizer.step[1:] > 0).all())
    other = activation(bits)
    other.calibrate(torch.zeros(2, 3))
    assert other.step.item() == 1.0


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_activations_have_zero_as_a_level(bits: int):
    x = torch.nn.functional.silu(3 * torch.randn(4, 3, 8, 8))
    quantizer = activation(bits)
    quantizer.calibrate(x)
    codes = quantizer.encode(torch.cat([torch.zeros(1, 3, 8, 8), x]))
    assert torch.equal(codes.decode()[0], torch.zeros(3, 8, 8))
    assert quantizer.zero_point.item() == int(quantizer.zero_point.item())
    assert codes.low <= 0 <= codes.high
    assert codes.high - codes.low == 2**bits - 1
    assert codes.low >= -(2**bits - 1)  # so that code - low is an unsigned integer of an engine


def test_unsigned_again_after_signed():
    quantizer = activation(4)
    quantizer.calibrate(torch.randn(2, 3))
    assert quantizer.zero_point > 0
    quantizer.calibrate(torch.randn(2, 3).relu())
    assert quantizer.zero_point == 0


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_half_precision_values_are_quantized_in_full_precision_and_kept_as_they_are(role: str):
    x = torch.randn(8, 6, 5, 5).bfloat16()
    quantizer = build(QuantSpec("lsq", 4, role), 8 if role == "weight" else 6, 0 if role == "weight" else 1)
    quantizer.calibrate(x if role == "weight" else x.relu())
    found = []
    for values in (x.clone().requires_grad_(), x.float().requires_grad_()):
        quantizer.zero_grad()
        y = quantizer(values)
        assert y.dtype == torch.float32
        (gradient,) = torch.autograd.grad((y**2).sum(), values, retain_graph=True, create_graph=True)
        y.square().sum().backward()
        found.append([y, values.grad.bfloat16(), quantizer.step.grad, gradient.bfloat16()])
        assert values.grad.dtype == values.dtype
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
