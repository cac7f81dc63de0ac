"""Tile by tile or whole: the same bits, values and gradients, whatever the layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewbits.quantizers import tiles
from fewbits.quantizers.learned_step import lsq
from fewbits.quantizers.rounding import sign_polynomial, sign_ste
from fewbits.quantizers.tiles import in_tiles, indicator

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "unsigned": lambda x, step: lsq(x, step, 0, 15, 0.01),
    "signed": lambda x, step: lsq(x, step, -8, 7, 0.01),
    "tensor bounds": lambda x, step: lsq(x, step, torch.tensor(-3.0), torch.tensor(12.0), 0.01),
    "sign": lambda x, step: sign_ste(x) * step,
    "bireal": lambda x, step: sign_polynomial(x) * step,
}
SHAPES = ((2, 3, 8, 8), (1, 1, 1, 1), (5, 7), (3, 5, 7, 3), (129,))


def passed(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Values, the gradient of the values, the gradient of the step."""
    x, step = x.clone(memory_format=torch.preserve_format).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    y = function(x, step)
    y.backward(grad)
    assert x.grad is not None
    assert step.grad is not None
    return y.detach(), x.grad, step.grad


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_change_nothing(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    x, grad = 2 * torch.randn(shape), torch.randn(shape)
    x.view(-1)[::3] = (x.view(-1)[::3] / 0.15).round() * 0.15  # on the boundaries of rounding and clipping
    expected = passed(FUNCTIONS[name], x, grad)
    monkeypatch.setattr(tiles, "TILE", 16)
    for given, wanted in zip(passed(FUNCTIONS[name], x, grad), expected, strict=True):
        assert torch.equal(given, wanted)
        assert given.stride() == wanted.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_may_differ(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch):
    """The gradient comes as the next layer made it: in another order, expanded from one number."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    for grad in (torch.randn(2, 3, 8, 8), torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2), torch.ones(()).expand(x.shape)):
        expected = passed(FUNCTIONS["signed"], x, grad)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "TILE", 16)
            given = passed(FUNCTIONS["signed"], x, grad)
        assert torch.equal(given[0], expected[0])
        assert torch.equal(given[1], expected[1])
        torch.testing.assert_close(given[2], expected[2])  # the sum goes through memory in another order
        assert given[0].is_contiguous(memory_format=layout)


def test_a_tensor_that_is_not_dense_is_taken_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "TILE", 4)
    shapes = []

    def double(v: Tensor, out: Tensor | None) -> tuple[Tensor]:
        shapes.append(v.shape)
        return (torch.add(v, v, out=out),)

    x = torch.arange(64.0).view(8, 8)
    assert torch.equal(in_tiles(double, 1, x[:, ::2])[0], 2 * x[:, ::2])
    assert shapes == [(8, 4)]
    assert torch.equal(in_tiles(double, 1, x)[0], 2 * x)
    assert len(shapes) > 2


def test_indicator_of_nan_is_zero():
    x = torch.tensor([float("nan"), -0.0, 1.0])
    assert indicator(torch.ge, x, 0).tolist() == [0.0, 1.0, 1.0]
