import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbits.quantizers import Quantizer, QuantSpec, build

F = np.float32


def make(bits: int, role: str, method: str = "dorefa") -> Quantizer:
    return build(QuantSpec(method, bits, role), 3, 0 if role == "weight" else 1)


def slow_q(z: np.float32, bits: int) -> tuple[np.float32, np.float32]:
    """Code and step of z in [0, 1]: the step first, then a division."""
    step = F(1) / F(2**bits - 1)
    return min(max(np.rint(z / step), F(0)), F(2**bits - 1)), step


@pytest.mark.parametrize("method", ["dorefa", "pact"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_by_loops(bits: int, method: str):
    w = torch.randn(3, 20, requires_grad=True)
    g = torch.randn(3, 20)
    y = make(bits, "weight", method)(w)
    y.backward(g)

    t = torch.tanh(w).detach().numpy().ravel()
    largest = max(abs(v) for v in t)
    at = int(np.argmax(np.abs(t)))
    values, grads = [], []
    for v, grad in zip(t, g.flatten().tolist(), strict=True):
        code, step = slow_q(v / (F(2) * largest) + F(0.5), bits)
        values.append(float(code * (F(2) * step) - F(1)))
        grads.append(grad * (1 - float(v) ** 2) / float(largest))
    # The maximum is not detached: it gets what all the others lose through it.
    lost = sum(grad * float(v) for v, grad in zip(t, g.flatten().tolist(), strict=True)) / float(largest) ** 2
    grads[at] -= math.copysign(1.0, t[at]) * (1 - float(t[at]) ** 2) * lost
    assert y.flatten().tolist() == values
    assert w.grad is not None
    torch.testing.assert_close(w.grad.flatten(), torch.tensor(grads), rtol=1e-4, atol=1e-5)


def test_weight_gradient_is_that_of_the_smooth_part():
    """Finite differences of tanh(w) / max|tanh(w)|, in float64, the largest element included."""
    w = torch.tensor([[-1.7, 0.3, 0.9, -0.2, 1.1, 0.05]])
    g = torch.tensor([[0.7, -1.1, 0.4, 2.0, -0.3, 0.9]])
    quantized = w.clone().requires_grad_()
    make(4, "weight")(quantized).backward(g)

    def smooth(values: Tensor) -> float:
        t = torch.tanh(values)
        return float((t / t.abs().max() * g.double()).sum())

    h, slow = 1e-6, []
    for i in range(w.numel()):
        bump = torch.zeros(1, w.numel(), dtype=torch.float64)
        bump[0, i] = h
        slow.append((smooth(w.double() + bump) - smooth(w.double() - bump)) / (2 * h))
    assert quantized.grad is not None
    torch.testing.assert_close(quantized.grad[0], torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_two_bit_weights_have_no_zero_level():
    levels = make(2, "weight")(torch.linspace(-2, 2, 101)[None]).unique()
    torch.testing.assert_close(levels, torch.tensor([-1, -1 / 3, 1 / 3, 1]))


def test_one_bit_weight():
    """E * sign(w), the mean over the layer and detached; the gradient is the identity: neither clipped nor scaled."""
    w = torch.tensor([[3.0, -0.5, 0.0], [0.25, -0.25, 2.0]], requires_grad=True)
    g = torch.randn(2, 3)
    y = make(1, "weight")(w)
    y.backward(g)
    assert torch.equal(y, torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]]))  # mean|w| = 1
    assert w.grad is not None
    assert torch.equal(w.grad, g)
    with torch.no_grad():
        w *= 0.1
    w.grad = None
    make(1, "weight")(w).backward(g)
    assert torch.equal(w.grad, g)


@pytest.mark.parametrize("bits", range(1, 9))
def test_activation_by_loops(bits: int):
    halves = (torch.arange(2 ** (bits + 1) + 1) * (0.5 / (2**bits - 1))).clamp(max=1.2)
    x = torch.cat([torch.randn(60), halves, torch.tensor([-0.0, 0.0, 1.0, 1e9, -1e9])]).requires_grad_()
    g = torch.randn_like(x)
    y = make(bits, "activation")(x)
    y.backward(g)
    values, grads = [], []
    for v, grad in zip(x.detach().numpy(), g.tolist(), strict=True):
        code, step = slow_q(min(max(v, F(0)), F(1)), bits)
        values.append(float(code * step))
        grads.append(grad if 0 <= v <= 1 else 0.0)
    assert y.tolist() == values
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(grads))


def test_off_is_a_clip_with_its_gradient():
    x = torch.tensor([-1.0, 0.0, 0.4, 1.0, 1.5], requires_grad=True)
    quantizer = make(2, "activation")
    quantizer.enabled.fill_(False)
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.4, 1.0, 1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(("bits", "engine"), [(1, "integer"), (2, "shifted"), (7, "shifted"), (8, "float")])
def test_what_an_engine_can_make_of_weights(bits: int, engine: str):
    quantizer = make(bits, "weight")
    assert quantizer.engine == engine
    codes = quantizer.encode(torch.randn(3, 20))
    if engine == "shifted":
        shifted = 2 * codes.integers - (2**bits - 1)
        assert int(shifted.abs().max()) <= 127
        torch.testing.assert_close(shifted * (codes.scale / 2), codes.decode(), rtol=1e-6, atol=1e-6)
