"""Other forms of what a layer reads, with the same values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..integers import lift
from .activations import GRID, Grid, dequantize
from .builder import Builder, producer


def in_float(builder: Builder, x: ir.Value) -> ir.Value:
    """The same values without a DequantizeLinear.

    Between that and a QuantizeLinear ONNX Runtime would quantize float weights by itself, on a grid of its own.
    """
    source = producer(x, "DequantizeLinear")
    if source is None or GRID not in x.meta:
        return x
    value = builder.node("Cast", source.inputs[0], to=ir.DataType.FLOAT)
    value = builder.node("Sub", value, builder.constant(x.meta[GRID].zero_point, np.float32))
    return builder.node("Mul", value, source.inputs[1])


def lifted(builder: Builder, x: ir.Value) -> ir.Value:
    """The same values on a finer grid, for weights of so many bits that they leave little room for a factor."""
    input_grid: Grid = x.meta[GRID]
    shift = lift(input_grid.highest)
    source = producer(x, "DequantizeLinear")
    if shift == 0 or source is None or source.inputs[0] is None:
        return x
    codes = builder.node("BitShift", source.inputs[0], builder.constant(shift, np.uint8), direction="LEFT")
    zero_point, lowest, highest = (v << shift for v in (input_grid.zero_point, input_grid.lowest, input_grid.highest))
    scale = input_grid.scale / 2**shift
    finer = Grid(scale, zero_point, lowest, highest)
    return dequantize(builder, codes, builder.constant(scale, np.float32), finer)


def repeated(builder: Builder, x: ir.Value, copies: int) -> ir.Value:
    """The same codes several times over, as channels."""
    source = producer(x, "DequantizeLinear")
    assert source is not None
    codes, scale = source.inputs[:2]
    assert scale is not None
    return dequantize(builder, builder.copy("Concat", (codes,) * copies, {"axis": 1}), scale, x.meta[GRID])
