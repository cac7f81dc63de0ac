"""Activation markers -> QuantizeLinear, integer Clip, DequantizeLinear on the trained grid.

Codes are UINT8 (signed ones run about as slow as float on x86): code + zero point. Below 8 bits an integer Clip ends
them at ``2**b - 1``. A ReLU or ReLU6 in front of a quantizer becomes part of that Clip: rounding is monotone, so
``code(clip(x, l, h)) = clip(code(x), code(l), code(h))`` exactly, and nothing stands between a convolution and its
QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ..quantizers import Quantizer
from ..quantizers.ewgs import EWGSActivation
from ..quantizers.minmax import MinMax
from ..quantizers.rounding import SMALLEST_STEP, positive
from ..quantizers.sign import BiRealActivation, ReActActivation, Sign, XNORActivation
from .builder import Builder, array_of, producer

GRID = "fewbits.grid"
"""Key in a value's ``meta``: the ``Grid`` that its numbers are on."""

RANK = "fewbits.rank"
"""Key in a value's ``meta``: how many dimensions it has."""

SIGNS = (Sign, XNORActivation, BiRealActivation, ReActActivation)
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Grid:
    """Where a dequantized activation lies: ``(code - zero_point) * scale``, codes from ``lowest`` to ``highest``."""

    scale: float
    zero_point: int
    lowest: int
    highest: int


@dataclass(frozen=True)
class Bits:
    """An activation as tensors of 0 and 1: what it stands for is ``lowest + step * (their sum)``."""

    values: tuple[ir.Value, ...]
    lowest: float
    step: float


@dataclass(frozen=True)
class Cut:
    """A place where PyTorch and the engine can be compared.

    Args:
        quantizer: qualified name.
        call: which run of a quantizer that runs several times.
        value: uint8 codes, int8 ones where ``is_signed``, or for a dynamic grid the float values.
        zero_point: what the exported codes add to the trained ones; None where ``value`` is float.
        shape: of ``value`` without the batch, where the quantizer was moved to the front; None: as in PyTorch.
        bits: where the activation is tensors of bits, of which ``value`` is the first.
        is_signed: the codes are int8.
    """

    quantizer: str
    call: int
    value: ir.Value
    zero_point: int | None
    shape: tuple[int, ...] | None = None
    bits: Bits | None = None
    is_signed: bool = False


def lower(builder: Builder, x: ir.Value, quantizer: Quantizer, name: str, call: int) -> tuple[ir.Value, Cut]:
    """The operators that do what ``quantizer`` (its run number ``call``) does to ``x``.

    Returns:
        The dequantized value, and where to compare.
    """
    if isinstance(quantizer, MinMax):
        value = dynamic_range(builder, x, quantizer)
        return value, Cut(name, call, value, None)
    if isinstance(quantizer, SIGNS):
        codes, scale, grid = _signs(builder, x, quantizer)
        cut = Cut(name, call, codes, grid.zero_point)
        return dequantize(builder, codes, builder.constant(scale, np.float32), grid), cut
    return _uniform(builder, x, quantizer, name, call)


def dequantize(builder: Builder, codes: ir.Value, scale: ir.Value, grid: Grid) -> ir.Value:
    """DequantizeLinear of uint8 codes; the result knows its grid."""
    value = builder.node("DequantizeLinear", codes, scale, builder.constant(grid.zero_point, np.uint8))
    value.meta[GRID] = grid
    return value


def _uniform(builder: Builder, x: ir.Value, quantizer: Quantizer, name: str, call: int) -> tuple[ir.Value, Cut]:
    zero = quantizer.encode(torch.zeros(()))
    zero_point, scale = -zero.low, zero.scale.float().numpy()
    lowest, highest = 0, zero.high - zero.low
    step, lower_end = steps_of(quantizer)
    rank = len(x.shape) if x.shape is not None else x.meta.get(RANK)
    views: list[ir.Node] = []
    while (node := producer(x, "Relu", "Clip", "MaxPool", *_VIEWS)) is not None and only_reader_of(x):
        if node.op_type in ("MaxPool", *_VIEWS):
            # What is quantized already is cheaper to round behind the pool.
            is_late = node.op_type == "MaxPool" and producer(node.inputs[0], "DequantizeLinear") is not None
            if is_late or _sizes(node.inputs[0]) is None or _sizes(x) is None:
                break
            # Rounding commutes with a view and with a maximum; these then move bytes, and what is in front meets its
            # quantizer.
            views.append(node)
        else:
            bounds = bounds_of(node)
            if bounds is None:
                break
            codes = quantizer.encode(torch.tensor(bounds)).integers + zero_point
            first, last = (min(max(int(c), lowest), highest) for c in codes)
            lowest, highest = first, last
        assert node.inputs[0] is not None
        x = node.inputs[0]
    x_shape = x
    behind_codes = producer(x, "DequantizeLinear") is not None
    if lower_end != 0.0:
        x = builder.node("Sub", x, builder.constant(lower_end, np.float32))
    elif behind_codes and RANK in x.meta:
        x = builder.node("Add", x, _nothing(builder, x.meta[RANK]))
    codes_value = builder.node(
        "QuantizeLinear", x, builder.constant(step, np.float32), builder.constant(zero_point, np.uint8)
    )
    # ONNX Runtime merges Q-DQ-Q-DQ into one pair on another grid; a Clip in between keeps both grids.
    if (lowest, highest) != (0, 255) or behind_codes:
        codes_value = builder.node(
            "Clip", codes_value, builder.constant(lowest, np.uint8), builder.constant(highest, np.uint8)
        )
    cut = Cut(name, call, codes_value, zero_point, _sizes(x_shape) if views else None)
    for node in reversed(views):
        codes_value = builder.copy(node.op_type, (codes_value, *node.inputs[1:]), node.attributes)
        if node.op_type == "MaxPool":
            cut = Cut(name, call, codes_value, zero_point, _sizes(node.outputs[0]))
    grid = Grid(float(scale), zero_point, lowest, highest)
    value = dequantize(builder, codes_value, builder.constant(scale, np.float32), grid)
    if rank is not None:
        value.meta[RANK] = rank
    return value, cut


def _nothing(builder: Builder, rank: int) -> ir.Value:
    """Zero on a grid of its own.

    From grid to grid is then one kernel on bytes (QLinearAdd) in ONNX Runtime, instead of a DequantizeLinear and a
    QuantizeLinear with floats between them: 24 us instead of 47 for 56 x 56 x 64 codes. The zero is a tensor that
    nobody else reads: where layouts change it is transposed, and a convolution whose zero point no longer is a constant
    takes three times as long.
    """
    scale, zero_point = builder.constant(1.0, np.float32), builder.constant(0, np.uint8)
    return builder.once("DequantizeLinear", builder.constant(np.zeros([1] * rank), np.uint8), scale, zero_point)


def steps_of(quantizer: Quantizer) -> tuple[float, float]:
    """What ``x`` is divided by to be rounded, and what is taken from it first: not the decoded scale in EWGS alone."""
    if isinstance(quantizer, EWGSActivation):
        step = positive(quantizer.upper - quantizer.lower) / quantizer.num_steps
        return float(step.detach()), float(quantizer.lower.detach())
    return float(quantizer.encode(torch.zeros(())).scale), 0.0


def only_reader_of(value: ir.Value) -> bool:
    """Whether exactly one node reads ``value``."""
    return not value.is_graph_output() and len(value.uses()) == 1


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The sizes behind the batch; None where one is not known."""
    if value is None or value.shape is None:
        return None
    sizes = tuple(size for size in value.shape[1:] if isinstance(size, int))
    return sizes if len(sizes) == len(value.shape) - 1 else None


def bounds_of(node: ir.Node) -> tuple[float, float] | None:
    """What a rectifier clips to; None where the bounds are computed."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [-float("inf"), float("inf")]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None:
            number = array_of(value)
            if number is None:
                return None
            bounds[index] = float(number)
    return bounds[0], bounds[1]


def _signs(builder: Builder, x: ir.Value, quantizer: Quantizer) -> tuple[ir.Value, float, Grid]:
    """Codes 0 and 2 with zero point 1: -1 and +1, and zero padding stays zero. sign(0) is +1."""
    above = is_plus(builder, x, quantizer)
    codes = builder.node("Where", above, builder.constant(2, np.uint8), builder.constant(0, np.uint8))
    return codes, 1.0, Grid(1.0, 1, 0, 2)


def is_plus(builder: Builder, x: ir.Value, quantizer: Quantizer) -> ir.Value:
    """Where a quantizer of signs gives +1, as booleans."""
    if isinstance(quantizer, ReActActivation):
        rank = len(x.shape) if x.shape is not None else 4
        shape = [1] * rank
        shape[quantizer.channel_dim] = -1
        x = builder.node("Add", x, builder.constant(quantizer.shift.detach().numpy().reshape(shape), np.float32))
    return builder.node("GreaterOrEqual", x, builder.constant(0.0, np.float32))


def dynamic_range(builder: Builder, x: ir.Value, quantizer: MinMax) -> ir.Value:
    """DTQ's ranges change with every batch: float operators, step by step as ``MinMax`` computes them."""
    steps = builder.constant(quantizer.num_steps, np.float32)
    zero, one = builder.constant(0.0, np.float32), builder.constant(1.0, np.float32)
    lowest = builder.node("ReduceMin", x, keepdims=0)
    highest = builder.node("ReduceMax", x, keepdims=0)
    step = builder.node("Div", builder.node("Sub", highest, lowest), steps)
    step = builder.node("Where", builder.node("Greater", step, builder.constant(SMALLEST_STEP, np.float32)), step, one)
    codes = builder.node("Round", builder.node("Div", builder.node("Sub", x, lowest), step))
    codes = builder.node("Clip", codes, zero, steps)
    return builder.node("Add", builder.node("Mul", codes, step), lowest)
