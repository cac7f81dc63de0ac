import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.quantizers.rounding import (
    SMALLEST_STEP,
    codes_ste,
    positive,
    scaled_sign,
    sign_polynomial,
    sign_ste,
    to_codes,
)

floats = st.floats(-100, 100, width=32)
steps = st.floats(2**-10, 8, width=32)


def test_halves_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert to_codes(x, torch.tensor(1.0), -8, 7).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    assert to_codes(x * 0.25, torch.tensor(0.25), -8, 7).tolist() == [-2, -2, 0, 0, 2, 2, 4]


@given(st.lists(floats, min_size=1, max_size=20), steps)
def test_codes_are_a_true_division_in_float32(values: list[float], step: float):
    x, s = torch.tensor(values), torch.tensor(step)
    slow = [min(max(float(np.rint(np.float32(v) / np.float32(step))), -8.0), 7.0) for v in values]
    assert to_codes(x, s, -8, 7).tolist() == slow


def test_division_is_not_multiplication_by_the_reciprocal():
    """Near ties the two differ; PyTorch's fused learnable operators do the other one."""
    step = torch.tensor(0.7)
    x = (torch.arange(1000) + 0.5) * step
    assert torch.equal(to_codes(x, step, 0, 2000), (x / step).round())
    assert not torch.equal(to_codes(x, step, 0, 2000), (x * (1 / step)).round())


def test_bounds_may_be_tensors():
    x = torch.linspace(-4, 4, 17)
    step = torch.tensor(0.5)
    assert torch.equal(to_codes(x, step, torch.tensor(-3.0), torch.tensor(4.0)), to_codes(x, step, -3, 4))


def test_codes_ste():
    x = torch.tensor([-1.0, 0.3, 9.0], requires_grad=True)
    step = torch.tensor(0.25, requires_grad=True)
    codes = codes_ste(x, step, 0, 3)
    codes.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert codes.tolist() == [0.0, 1.0, 3.0]
    assert x.grad is not None
    assert x.grad.tolist() == [4.0, 8.0, 12.0]
    assert step.grad is None


@pytest.mark.parametrize("value", [2.0, 1e-7, 1e-8, 0.0, -1e-20, -3.0])
@pytest.mark.parametrize("grad", [-1.5, 0.0, 1.5])
def test_positive(value: float, grad: float):
    raw = torch.tensor(value, requires_grad=True)
    kept = positive(raw)
    kept.backward(torch.tensor(grad))
    assert kept.item() == float(np.float32(max(np.float32(value), np.float32(SMALLEST_STEP))))
    assert raw.grad is not None
    assert float(raw.grad) == (grad if raw.item() > np.float32(SMALLEST_STEP) else min(grad, 0.0))


def test_positive_of_many():
    raw = torch.tensor([0.5, -1.0, -1.0], requires_grad=True)
    positive(raw).backward(torch.tensor([1.0, 1.0, -1.0]))
    assert raw.grad is not None
    assert raw.grad.tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("sign", [sign_ste, sign_polynomial])
def test_sign_of_zero_is_one(sign):
    assert sign(torch.tensor([0.0, -0.0, 1e-30, -1e-30])).tolist() == [1, 1, 1, -1]


@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from([0.5, 1.0, float("inf")]))
def test_sign_ste(values: list[float], clip: float):
    x = torch.tensor(values, requires_grad=True)
    g = torch.arange(1.0, len(values) + 1)
    sign_ste(x, clip).backward(g)
    assert x.grad is not None
    assert x.grad.tolist() == [float(i) if abs(v) <= clip else 0.0 for i, v in enumerate(values, start=1)]


@given(st.lists(floats, min_size=1, max_size=20), st.floats(0.125, 2, width=32))
def test_scaled_sign(values: list[float], scale: float):
    x, s = torch.tensor(values, requires_grad=True), torch.tensor(scale, requires_grad=True)
    g = torch.arange(1.0, len(values) + 1)
    y = scaled_sign(x, s)
    y.backward(g)
    signs = [1.0 if v >= 0 else -1.0 for v in values]
    assert y.tolist() == [scale * sign for sign in signs]
    assert x.grad is not None
    assert x.grad.tolist() == [float(i) if abs(v) <= 1 else 0.0 for i, v in enumerate(values, start=1)]
    assert s.grad is not None
    assert s.grad.item() == sum(i * sign for i, sign in enumerate(signs, start=1))


def test_sign_polynomial():
    values = [-1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5]
    x = torch.tensor(values, requires_grad=True)
    sign_polynomial(x).backward(torch.full((10,), 3.0))
    slow = [2 + 2 * v if -1 <= v < 0 else 2 - 2 * v if 0 <= v <= 1 else 0.0 for v in values]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0 * slope for slope in slow]
