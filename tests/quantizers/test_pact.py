import numpy as np
import pytest
import torch

from fewbits.quantizers import QuantSpec, build
from fewbits.quantizers.pact import PACTActivation

F = np.float32


def make(bits: int, alpha: float = 1.5, start: str = "data") -> PACTActivation:
    quantizer = build(QuantSpec("pact", bits, "activation", start=start), 3, 1)
    assert isinstance(quantizer, PACTActivation)
    torch.nn.init.constant_(quantizer.alpha, alpha)
    return quantizer


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_by_loops(bits: int, enabled: bool):
    alpha = F(1.7)
    step = alpha / F(2**bits - 1)
    halves = torch.arange(2 ** (bits + 1)) * (float(step) / 2)
    x = torch.cat([2 * torch.randn(60), halves, torch.tensor([0.0, float(alpha), 1e9])]).requires_grad_()
    g = torch.randn_like(x)
    quantizer = make(bits, float(alpha))
    quantizer.enabled.fill_(enabled)
    y = quantizer(x)
    y.backward(g)

    values, grads, grad_alpha = [], [], 0.0
    for v, grad in zip(x.detach().numpy(), g.tolist(), strict=True):
        clipped = min(max(v, F(0)), alpha)
        code = min(np.rint(clipped / step), F(2**bits - 1))
        values.append(float(code * step if enabled else clipped))
        grads.append(grad if 0 <= v < alpha else 0.0)
        grad_alpha += grad if v >= alpha else 0.0
    assert y.tolist() == values
    assert x.grad is not None
    assert x.grad.tolist() == grads
    assert quantizer.alpha.grad is not None
    assert quantizer.alpha.grad.item() == pytest.approx(grad_alpha, rel=1e-5, abs=1e-5)


def test_a_value_at_alpha_moves_alpha_only():
    x = torch.tensor([1.5], requires_grad=True)
    quantizer = make(2)
    quantizer(x).backward(torch.tensor([2.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0]
    assert quantizer.alpha.grad is not None
    assert quantizer.alpha.grad.item() == 2.0


def test_starts():
    x = torch.randn(4, 3, 16, 16).relu()
    ours, paper = make(4), make(4, start="paper")
    ours.calibrate(x)
    paper.calibrate(x)
    assert ours.alpha.item() == pytest.approx(float(torch.quantile(x, 0.999)), rel=1e-5)
    assert paper.alpha.item() == 8.0


def test_a_dead_layer_starts_at_one():
    quantizer = make(4)
    quantizer.calibrate(torch.zeros(2, 3))
    assert quantizer.alpha.item() == 1.0


def test_the_penalty_on_alpha_is_part_of_the_method():
    assert make(4).decayed == ("alpha",)
