"""A quantized convolution on whole numbers, as an inference engine computes it, in the forward pass of training.

Values on a grid are codes times a step. So a convolution of two such tensors is one of whole numbers, which a processor
multiplies several times as fast, and exactly: only the product with both steps is rounded, where in float32 each sum
is. Gradients are float, and stay with PyTorch's convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .rounding import SMALLEST_STEP, to_codes

_NAME = "fewbits::integer_convolution"
_INPUT = "Tensor codes, Tensor step, Tensor low"
_WEIGHT = "Tensor weight, Tensor weight_step, Tensor weight_low, Tensor weight_high, Tensor? bias"
_PLACE = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
torch.library.define(_NAME, f"({_INPUT}, {_WEIGHT}, {_PLACE}) -> Tensor")
INTEGER_CONVOLUTION = torch.ops.fewbits.integer_convolution.default
"""The operator of a compiled graph: of ``graph.LSQ_CODES`` and a float weight that is quantized by LSQ on the way."""


@cache
def is_available() -> bool:
    """Whether this processor multiplies bytes in one instruction, and PyTorch's kernels for it are exact."""
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        return False
    # The largest sums there are, which older instructions cut off at 16 bits.
    codes = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.full((16, 64, 3, 3), -127, dtype=torch.int8)
    place = ((1, 1), (1, 1), (1, 1))
    sums = _convolve(codes, 1.0, 128, weight, torch.ones(1), None, *place)
    return sums[0, 0, 1, 1].item() == -127 * 127 * 64 * 9 and sums[0, 0, 0, 0].item() == -127 * 127 * 64 * 4


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
    given = (codes, step, zero_point, packed, weight_step, zeros, bias, *place)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(*given, 1.0, 0, torch.float32, "none", [], "")
    return y


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _(
    codes: Tensor,
    step: Tensor,
    low: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    weight_low: Tensor,
    weight_high: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    x = torch.empty_like(codes, dtype=weight.dtype)
    y = torch.ops.aten.convolution.default(x, weight, None, stride, padding, dilation, False, [0, 0], 1)
    return torch.empty_like(y, memory_format=torch.channels_last)


@torch.library.impl(_NAME, "CPU")
def _(
    codes: Tensor,
    step: Tensor,
    low: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    weight_low: Tensor,
    weight_high: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    weight_step = weight_step.clamp(min=SMALLEST_STEP)
    kernel = to_codes(weight, weight_step, weight_low, weight_high).to(torch.int8).contiguous()
    given = (max(step.item(), SMALLEST_STEP), -int(low), kernel, weight_step.reshape(-1), bias)
    return _convolve(codes, *given, stride, padding, dilation)
