"""Quantized convolutions and matrix products on whole numbers, as an inference engine has them, in a training step.

Values on a grid are codes times a step. So a product of two such tensors is one of whole numbers, which a processor
multiplies several times as fast, and exactly: only the result times both steps is rounded, where in float32 each sum
is. Gradients are float, and stay with PyTorch's operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .rounding import SMALLEST_STEP, to_codes

_CONVOLUTION, _LINEAR = "fewbits::integer_convolution", "fewbits::integer_linear"
_INPUT = "Tensor codes, Tensor step, Tensor low"
_WEIGHT = "Tensor weight, Tensor weight_step, Tensor weight_low, Tensor weight_high, Tensor? bias"
_PLACE = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
torch.library.define(_CONVOLUTION, f"({_INPUT}, {_WEIGHT}, {_PLACE}) -> Tensor")
torch.library.define(_LINEAR, f"({_INPUT}, {_WEIGHT}) -> Tensor")
INTEGER_CONVOLUTION = torch.ops.fewbits.integer_convolution.default
INTEGER_LINEAR = torch.ops.fewbits.integer_linear.default
"""Operators of a compiled graph: of ``graph.LSQ_CODES`` and a float weight that they quantize by LSQ themselves."""


MOST_TERMS = 2**31 // (255 * 128) - 1
"""Of a sum in 32 bits."""


def takes(size: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether oneDNN convolves bytes of these shapes correctly.

    In kernels for AMX it does not where a window lies in the padding alone, a result of width 1 has a stride, the
    window is 1 wide and padded above, or it has gaps: wrong values, and memory that is not theirs (oneDNN in PyTorch
    2.13, found by random shapes). So: square windows without gaps, no wider than the map, padded by at most half of
    theirs, and no stride where there is nothing to stride over.

    Args:
        size: of the input, N x C x H x W.
        kernel: of the weight, K x C x H x W.
        stride, padding, dilation: of height and width.
    """
    are_square = all(len(each) == 2 and each[0] == each[1] for each in (kernel[2:], stride, padding, dilation))
    if math.prod(kernel[1:]) > MOST_TERMS or not are_square or dilation[0] != 1:
        return False
    window, step, margin, shortest = kernel[2], stride[0], padding[0], min(size[2:])
    results = (shortest + 2 * margin - window) // step + 1
    return shortest >= window >= 2 * margin and (results > 1 or step == 1)


@cache
def is_available() -> bool:
    """Whether this processor multiplies bytes in one instruction, and PyTorch's kernels for it are exact."""
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.device("cpu"), torch.no_grad():
            return _is_exact()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # another PyTorch, whose operators are called otherwise


def _is_exact() -> bool:
    """With the largest sums there are, which older instructions cut off at 16 bits."""
    codes = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.full((16, 64, 3, 3), -127, dtype=torch.int8)
    one, place = torch.ones(1, dtype=torch.float32), ((1, 1), (1, 1), (1, 1))
    sums = _convolve(codes, 1.0, 128, weight, one, None, *place)[0, 0, :2, :2].flatten().tolist()
    products = _multiply(codes.reshape(9, 64), 1.0, 128, weight[:, :, 0, 0].contiguous(), one, None)
    one_place = -127 * 127 * 64
    return sums == [4 * one_place, 6 * one_place, 6 * one_place, 9 * one_place] and bool((products == one_place).all())


def _convolve(
    codes: Tensor,
    step: float,
    zero_point: int,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """By oneDNN, in float32 and channels-last; one step for the weight, or one for each of its rows."""
    place = (stride, padding, dilation, 1)
    packed = torch.ops.onednn.qconv_prepack(weight, weight_step, step, zero_point, *place, codes.shape)
    zeros = torch.zeros_like(weight_step, dtype=torch.int32)
    given = (codes, step, zero_point, packed, weight_step, zeros, _dense(bias), *place)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(*given, 1.0, 0, torch.float32, "none", [], "")
    return y


def _multiply(
    codes: Tensor, step: float, zero_point: int, weight: Tensor, weight_step: Tensor, bias: Tensor | None
) -> Tensor:
    """By oneDNN, M x K and N x K to M x N in float32; steps as for a convolution."""
    packed = torch.ops.onednn.qlinear_prepack(weight, codes.shape)
    zeros = torch.zeros_like(weight_step, dtype=torch.int32)
    given = (codes, step, zero_point, packed, weight_step, zeros, _dense(bias))
    y: Tensor = torch.ops.onednn.qlinear_pointwise(*given, 1.0, 0, torch.float32, "none", [], "")
    return y


def _dense(bias: Tensor | None) -> Tensor | None:
    """Copied where it must be: oneDNN reads one value behind the other."""
    return None if bias is None else bias.contiguous()


def _quantized(weight: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and the positive steps."""
    step = step.clamp(min=SMALLEST_STEP)
    return to_codes(weight, step, low, high).to(torch.int8).contiguous(), step.reshape(-1)


def _in_codes(codes: Tensor, step: Tensor, low: Tensor, weight: Tensor, *given: Any) -> tuple[Any, ...]:
    """What oneDNN takes of what an operator is given: numbers, and the weight's codes."""
    weight_step, weight_low, weight_high, *others = given
    whole = _quantized(weight, weight_step, weight_low, weight_high)
    return codes, max(step.item(), SMALLEST_STEP), -int(low), *whole, *others


@torch.library.impl(_CONVOLUTION, "CPU")
def _(*given: Any) -> Tensor:
    return _convolve(*_in_codes(*given))


@torch.library.impl(_LINEAR, "CPU")
def _(*given: Any) -> Tensor:
    return _multiply(*_in_codes(*given))


@torch.library.register_fake(_CONVOLUTION)  # type: ignore[untyped-decorator]
def _(codes: Tensor, step: Tensor, low: Tensor, weight: Tensor, *given: Any) -> Tensor:
    x, place = torch.empty_like(codes, dtype=weight.dtype), given[-3:]
    y = torch.ops.aten.convolution.default(x, weight, None, *place, False, [0, 0], 1)
    return torch.empty_like(y, memory_format=torch.channels_last)


@torch.library.register_fake(_LINEAR)  # type: ignore[untyped-decorator]
def _(codes: Tensor, step: Tensor, low: Tensor, weight: Tensor, *given: Any) -> Tensor:
    return weight.new_empty(codes.shape[0], weight.shape[0])
