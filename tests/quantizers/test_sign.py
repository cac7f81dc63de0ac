import pytest
import torch
from torch import Tensor

from fewbits.quantizers import Quantizer, QuantSpec, build

EDGES = torch.tensor([-1.5, -1.0, -0.999, -0.25, -0.0, 0.0, 0.25, 0.999, 1.0, 1.5])


def make(method: str, role: str, num_channels: int = 3, channel_dim: int = 0) -> Quantizer:
    return build(QuantSpec(method, 1, role), num_channels, channel_dim)


def gradients(quantizer: Quantizer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(g)
    assert x.grad is not None
    return y.detach(), x.grad


def sign(v: float) -> float:
    return 1.0 if v >= 0 else -1.0


def polynomial(v: float) -> float:
    return 2 + 2 * v if -1 <= v < 0 else 2 - 2 * v if 0 <= v <= 1 else 0.0


SLOPES = {
    ("sign", "weight"): lambda v: float(abs(v) <= 1),
    ("sign", "activation"): lambda v: float(abs(v) <= 1),
    ("xnor", "activation"): lambda v: float(abs(v) < 1),
    ("bireal", "activation"): polynomial,
    ("react", "activation"): polynomial,
}


@pytest.mark.parametrize(("method", "role"), SLOPES)
def test_signs_by_loops(method: str, role: str):
    x = torch.cat([EDGES, torch.randn(50)])[None]
    g = torch.randn_like(x)
    y, grad = gradients(make(method, role, 60, 1), x, g)
    assert y[0].tolist() == [sign(v) for v in x[0].tolist()]
    slow = [SLOPES[method, role](v) * b for v, b in zip(x[0].tolist(), g[0].tolist(), strict=True)]
    torch.testing.assert_close(grad[0], torch.tensor(slow))


@pytest.mark.parametrize("shape", [(3, 10), (3, 5, 2, 1)])
def test_xnor_weight_by_loops(shape: tuple[int, ...]):
    """(1/n) sign(w_i) sum_j g_j sign(w_j) + alpha g_i 1{|w_i| <= 1}, n the weights of an output channel."""
    w = torch.stack([EDGES, EDGES.roll(3) * 0.9, torch.randn(10)]).view(shape)
    g = torch.randn(shape)
    y, grad = gradients(make("xnor", "weight"), w, g)
    for c in range(3):
        row, grads = w[c].flatten().tolist(), g[c].flatten().tolist()
        alpha = sum(map(abs, row)) / 10
        through_mean = sum(b * sign(v) for v, b in zip(row, grads, strict=True)) / 10
        slow = [sign(v) * through_mean + alpha * b * (abs(v) <= 1) for v, b in zip(row, grads, strict=True)]
        torch.testing.assert_close(y[c].flatten(), torch.tensor([alpha * sign(v) for v in row]))
        torch.testing.assert_close(grad[c].flatten(), torch.tensor(slow))


def test_xnor_weight_gradient_is_the_true_one_of_the_scale():
    """With all weights inside the window: autograd through mean|w| * STE(sign(w))."""
    w = torch.rand(3, 10) - 0.5
    g = torch.randn(3, 10)
    _, grad = gradients(make("xnor", "weight"), w, g)
    w.requires_grad_()
    signs = w + (torch.where(w >= 0, 1.0, -1.0) - w).detach()
    (w.abs().mean(1, keepdim=True) * signs).backward(g)
    assert w.grad is not None
    torch.testing.assert_close(grad, w.grad)


@pytest.mark.parametrize("method", ["bireal", "react"])
def test_bireal_weight_by_loops(method: str):
    """The value carries the scale, the gradient does not."""
    w, g = torch.stack([EDGES, 0.1 * EDGES, 3 * EDGES]), torch.randn(3, 10)
    y, grad = gradients(make(method, "weight"), w, g)
    for c in range(3):
        mean = sum(map(abs, w[c].tolist())) / 10
        torch.testing.assert_close(y[c], torch.tensor([mean * sign(v) for v in w[c].tolist()]))
        assert grad[c].tolist() == [b * (abs(v) <= 1) for v, b in zip(w[c].tolist(), g[c].tolist(), strict=True)]


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 3, 4, 5), 1), ((2, 7, 3), -1), ((2, 3), -1)])
def test_react_shift_per_channel(shape: tuple[int, ...], channel_dim: int):
    quantizer = make("react", "activation", 3, channel_dim)
    shift = quantizer.get_parameter("shift")
    assert shift.tolist() == [0.0, 0.0, 0.0]
    with torch.no_grad():
        shift.copy_(torch.tensor([0.5, 0.0, -0.75]))
    x, g = torch.randn(shape), torch.randn(shape)
    y, grad = gradients(quantizer, x, g)
    slow_shift = [0.0, 0.0, 0.0]
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        at = tuple(index)
        channel = at[channel_dim]
        v = float(x[at] + shift[channel].detach())
        assert y[at] == sign(v)
        slope = polynomial(v) * float(g[at])
        assert float(grad[at]) == pytest.approx(slope, abs=1e-6)
        slow_shift[channel] += slope
    assert shift.grad is not None
    torch.testing.assert_close(shift.grad, torch.tensor(slow_shift))


def test_signs_behind_a_relu_are_not_ternary():
    x = torch.randn(2, 3, 4).relu()
    for method, role in SLOPES:
        assert make(method, role, 3, 1)(x).unique().tolist() == [1.0]
