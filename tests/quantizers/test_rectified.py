"""A ReLU's work done by the quantizer behind it: the bits of one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.quantizers import QuantSpec, build, native
from fewbits.quantizers.lsq import LSQActivation
from fewbits.quantizers.rectified import quantize_rectified

RELUS = [nn.ReLU, nn.ReLU6]
needs_native = pytest.mark.skipif(not native.is_available(), reason=native.reason() or "there is one")


def made(bits: int, zero_point: int = 0, step: float = 0.3) -> LSQActivation:
    quantizer = build(QuantSpec("lsq", bits, "activation"), 3, 1)
    assert isinstance(quantizer, LSQActivation)
    with torch.no_grad():
        quantizer.step.fill_(step)
        quantizer.zero_point.fill_(zero_point)
    return quantizer


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """With zeros of both signs, ties, both ends of the grid, a ceiling, and what is not finite."""
    torch.manual_seed(0)
    x, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    flat = x.view(-1)
    odd = (0.0, -0.0, 6.0, 6.3, -6.0, 0.15, 0.45, -0.15, 4.5, 1e-30, -1e-30, 1e30, float("inf"), -float("inf"))
    for place, value in enumerate(odd):
        flat[place::31] = value
    return x, grad


def passed(function: Any, quantizer: LSQActivation, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x * 1.0)  # a ReLU that works in place may not have a leaf
    return [y.detach(), *torch.autograd.grad(y, (x, quantizer.step), grad.to(y.dtype))]


@needs_native
@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "zero_point"), [(1, 0), (2, 0), (4, 0), (4, 3), (8, 0)])
def test_the_bits_of_one_after_the_other(
    relu: type[nn.ReLU], inplace: bool, dtype: torch.dtype, bits: int, zero_point: int
):
    quantizer, first = made(bits, zero_point), relu(inplace=inplace)
    for shape in ((5,), (2, 3, 40, 41), (64, 100)):
        x, grad = values(shape, dtype)
        if len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        both = [
            passed(function, quantizer, x, grad)
            for function in (lambda x: quantize_rectified(quantizer, first, x), lambda x: quantizer(first(x)))
        ]
        for fast, slow in zip(*both, strict=True):
            assert torch.equal(fast, slow)
            assert fast.dtype == slow.dtype
            assert fast.stride() == slow.stride()


@needs_native
def test_what_is_no_number_stays_none():
    quantizer, x = made(4), torch.tensor([float("nan"), 1.0])
    for function in (lambda x: quantize_rectified(quantizer, nn.ReLU(), x), lambda x: quantizer(nn.ReLU()(x))):
        y, grad_x, grad_step = passed(function, quantizer, x, torch.ones(2))
        assert torch.equal(y.isnan(), torch.tensor([True, False]))
        assert grad_step.isnan()
        assert grad_x.tolist() == [0.0, 1.0]


@needs_native
def test_it_is_one_pass_that_keeps_its_input_alone():
    quantizer = made(4)
    x = torch.randn(8, requires_grad=True) * 1.0
    y = quantize_rectified(quantizer, nn.ReLU(), x)
    assert type(y.grad_fn).__name__ == "_RectifiedLSQBackward"
    assert y.grad_fn.next_functions[0][0] is x.grad_fn
    assert [saved.data_ptr() for saved in y.grad_fn.saved_tensors] == [x.data_ptr(), quantizer.step.data_ptr()]


def test_elsewhere_one_comes_after_the_other(monkeypatch: pytest.MonkeyPatch):
    x, grad = values((2, 3, 5, 5))

    def same(quantizer: LSQActivation, dtype: torch.dtype = torch.float32) -> bool:
        given = passed(lambda x: quantize_rectified(quantizer, nn.ReLU6(), x), quantizer, x.to(dtype), grad.to(dtype))
        wanted = passed(lambda x: quantizer(nn.ReLU6()(x)), quantizer, x.to(dtype), grad.to(dtype))
        return all(torch.equal(one, two) for one, two in zip(given, wanted, strict=True))

    closed = made(4)
    closed.enabled.fill_(False)
    assert same(closed)
    with monkeypatch.context() as patch:
        patch.setattr(native, "serves", lambda *_: False)
        assert same(made(4))
    assert same(made(4), torch.float16)


@needs_native
@pytest.mark.parametrize("relu", RELUS)
def test_gradients_of_gradients_and_many_at_once(relu: type[nn.ReLU]):
    quantizer, (x, grad) = made(4), values((4, 6))
    x = torch.where(x.isfinite(), x, 1.0).requires_grad_()
    found = []
    for function in (lambda x: quantize_rectified(quantizer, relu(), x), lambda x: quantizer(relu()(x))):
        weight = grad.clone().requires_grad_()
        first = torch.autograd.grad((function(x) * weight).sum(), (x, quantizer.step), create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), weight)
        many = torch.autograd.grad(function(x), x, torch.stack([grad, 2 * grad]), is_grads_batched=True)
        found.append([*first, *second, *many])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
