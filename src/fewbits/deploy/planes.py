"""Layers of one-bit weights and activations of few levels as a sum of XNOR convolutions, one for each step of the grid.

An unsigned code is the number of thresholds that a value reaches: ``code = low + [x >= t_1] + ... + [x >= t_n]``, three
of them for two bits. With the bits b_k, and +1 and -1 in their place as the XNOR kernel takes them, a convolution with
weights w of -1 and +1 is ::

    sum w code = low sum w + sum_k sum w b_k = 1/2 (sum_k XNOR_k + (n + 2 low) sum w)

over the whole window. Where the window reaches over the edge the code is 0, and bit k is what it is for zero: +1 for
the first ``-low`` thresholds, -1 for the rest. So each plane is padded by its own sign, and nothing is left to correct.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ..integers import Floats, Ints
from ..quantizers import Quantizer
from ..quantizers.minmax import MinMax
from . import xnor
from .activations import SIGNS, Bits
from .builder import Builder
from .weights import WeightGrid

MOST_STEPS = 3
"""Of a two-bit grid: each step costs one convolution, and seven are slower than int8 for any width measured."""

_LARGEST = int(np.array(np.finfo(np.float32).max, np.float32).view(np.int32))


def serves(quantizer: Quantizer) -> bool:
    """Whether the activation's codes are counts of at most ``MOST_STEPS`` thresholds."""
    is_fixed = not isinstance(quantizer, MinMax) and quantizer.engine != "float"
    return is_fixed and not isinstance(quantizer, SIGNS) and quantizer.num_steps <= MOST_STEPS


def bits(builder: Builder, x: ir.Value, quantizer: Quantizer) -> Bits:
    """One tensor of 0 and 1 for each step of the grid."""
    zero = quantizer.encode(torch.zeros(()))
    values = [xnor.compare(builder, x, quantizer, below) for below in thresholds(quantizer)]
    return Bits(tuple(values), zero.low * float(zero.scale), float(zero.scale))


def thresholds(quantizer: Quantizer) -> Floats:
    """For each step the largest float32 whose code lies below it: the quantizer's own ties, whatever its formula is.

    Codes never fall as ``x`` rises, so each is found by bisection over all floats, asking the quantizer itself.
    """
    zero = quantizer.encode(torch.zeros(()))
    steps = np.arange(zero.low + 1, zero.high + 1)
    below, above = np.full(len(steps), -_LARGEST), np.full(len(steps), _LARGEST)
    while (above - below).max() > 1:
        middle = below + (above - below) // 2
        reached = quantizer.encode(torch.from_numpy(_floats(middle))).integers.numpy() >= steps
        below, above = np.where(reached, below, middle), np.where(reached, middle, above)
    return np.asarray(_floats(below), np.float64)


def convolution(
    builder: Builder, planes: Bits, conv: ir.Node, grid: WeightGrid
) -> tuple[ir.Value, tuple[ir.Value, ...], float]:
    """Whole numbers, N x O x H x W, the XNOR convolutions that they are the sum of, and what one of them stands for.

    The result times that unit and the weights' scale is the convolution.
    """
    low, num_steps = round(planes.lowest / planes.step), len(planes.values)
    products = tuple(
        xnor.convolution(builder, bit, conv, grid, pad=1.0 if step < -low else -1.0)
        for step, bit in enumerate(planes.values)
    )
    total = products[0]
    for product in products[1:]:
        total = builder.node("Add", total, product)
    sums = (2 * grid.unsigned - 1).reshape(len(grid.unsigned), -1).sum(1)
    constant = ((num_steps + 2 * low) * sums).reshape(1, -1, 1, 1)
    return builder.node("Add", total, builder.constant(constant, np.float32)), products, planes.step / 2


def _floats(order: Ints) -> npt.NDArray[np.float32]:
    """The floats in their order: 0 is zero, 1 the smallest one above it, -1 its negative."""
    magnitude = np.abs(order).astype(np.int32).view(np.float32)
    return np.where(order < 0, -magnitude, magnitude)
