import numpy as np
import pytest
import torch

from fewbits.quantizers import Quantizer, QuantSpec, build

F = np.float32


def make(bits: int, role: str = "activation") -> Quantizer:
    return build(QuantSpec("minmax-frozen", bits, role), 3, 1)


@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_by_loops(bits: int, role: str):
    data = torch.cat([torch.rand(60) * 1.9 - 0.7, torch.tensor([-0.75, 1.25])])
    quantizer = make(bits, role)
    quantizer.calibrate(data)
    x = torch.cat([data, torch.tensor([-3.0, 3.0, 0.0])]).requires_grad_()
    g = torch.randn_like(x)
    y = quantizer(x)
    y.backward(g)

    lo, hi, steps = F(-0.75), F(1.25), 2**bits - 1
    if role == "weight" and bits == 8:
        lo, steps = -hi, 254
    s = F((hi - lo) / F(steps))
    z = np.rint(-lo / s)
    values, grads = [], []
    for each, grad in zip(x.detach().numpy(), g.tolist(), strict=True):
        code = min(max(np.rint(each / s), -z), steps - z)
        values.append(float(F(code) * s))
        grads.append(grad if -z <= each / s <= steps - z else 0.0)
    assert y.tolist() == values
    assert x.grad is not None
    assert x.grad.tolist() == grads
    codes = quantizer.encode(x)
    assert (codes.low, codes.high) == (-int(z), steps - int(z))
    assert role == "activation" or codes.low >= -127


def test_zero_is_a_level_and_the_range_is_fixed():
    quantizer = make(3)
    quantizer.calibrate(torch.tensor([-1.0, 2.5]))
    x = torch.tensor([0.0, 0.4, 100.0])
    assert quantizer(x)[0] == 0.0
    assert torch.equal(quantizer(x)[:2], quantizer(x[:2]))  # whatever else is in the batch


def test_what_a_relu_gave_needs_no_level_below_zero():
    quantizer = make(2)
    quantizer.calibrate(torch.tensor([0.5, 3.0]))
    assert quantizer.encode(torch.tensor([0.0, 1.0, 3.0])).integers.tolist() == [0, 1, 3]
    assert quantizer.engine == "integer"


def test_a_single_bit_is_refused():
    with pytest.raises(ValueError, match="method 'minmax-frozen' works on 2, 3, 4, 5, 6, 7, 8 bit, got bits=1"):
        make(1)
