"""Weights for OpenVINO: packed in the file, looked up in a table, folded to int8 when it is loaded.

They are folded only if no uint8 constant meets a Gather or a shift directly: codes are cast to int32 first, and the
table to the floats that come of it. A FakeQuantize of 255 levels then tells OpenVINO that the floats are integers times
a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..integers import Floats, Ints
from .builder import Builder
from .packing import pack
from .weights import WeightGrid

DOMAIN = "org.openvinotoolkit"
WEIGHT_LEVELS, LARGEST_WEIGHT = 255, 127


def fake_quantize(
    builder: Builder, x: ir.Value, bounds: tuple[Any, Any], outputs: tuple[Any, Any], levels: int
) -> ir.Value:
    """OpenVINO's operator: ``x`` clipped to ``bounds``, rounded to ``levels`` levels, spread over ``outputs``."""
    return _fake_quantize(builder, x, [builder.constant(end, np.float32) for end in (*bounds, *outputs)], levels)


def _fake_quantize(builder: Builder, x: ir.Value, ends: Sequence[ir.Value], levels: int) -> ir.Value:
    node = ir.node("FakeQuantize", [x, *ends], {"levels": levels}, domain=DOMAIN)
    return builder.append(node)


def weight(builder: Builder, grid: WeightGrid, factor: Floats, *, transposed: bool = False) -> ir.Value:
    """The weight times a factor for each output channel, on OpenVINO's grid of 255 levels."""
    codes = grid.unsigned.T if transposed else grid.unsigned
    shape = [1, -1] if transposed else [-1] + [1] * (codes.ndim - 1)
    # Integers are turned where the factor is negative: a grid's output bounds have to rise.
    turned = factor < 0
    scale = (np.broadcast_to(grid.scale, factor.shape) * np.abs(factor)).reshape(shape)
    if grid.offset is not None or not fits(grid):
        return builder.node("Mul", values(builder, grid, codes), builder.constant(factor.reshape(shape), np.float32))
    value = _integers(builder, grid, codes)
    if turned.any():
        value = builder.node("Mul", value, builder.constant(np.where(turned, -1, 1).reshape(shape), np.float32))
    # A channel that batch norm switches off has no grid of its own; its weights are zero whatever the grid.
    scale = np.where(scale > 0, scale, np.finfo(np.float32).tiny)
    bounds = [builder.constant(end, np.float32) for end in (-LARGEST_WEIGHT, LARGEST_WEIGHT)]
    highest = builder.constant(LARGEST_WEIGHT * scale, np.float32)
    return _fake_quantize(builder, value, (*bounds, builder.node("Neg", highest), highest), WEIGHT_LEVELS)


def fits(grid: WeightGrid) -> bool:
    """Whether the integers have room in eight bits with a sign."""
    return int(np.abs(grid.integers).max(initial=0)) <= LARGEST_WEIGHT


def values(builder: Builder, grid: WeightGrid, codes: Ints) -> ir.Value:
    """The trained weights as floats."""
    scale = grid.scale if grid.scale.size == 1 else grid.scale.reshape([-1] + [1] * (codes.ndim - 1))
    value = builder.node("Mul", _integers(builder, grid, codes), builder.constant(scale, np.float32))
    return value if grid.offset is None else builder.node("Add", value, builder.constant(grid.offset, np.float32))


def _integers(builder: Builder, grid: WeightGrid, codes: Ints) -> ir.Value:
    """What an engine multiplies, as floats, from packed codes: a byte is looked up in a table of the codes in it."""
    bits, shape = grid.bits, builder.constant(codes.shape, np.int64)
    packed = pack(codes, bits)
    stored = builder.constant(packed, np.uint8, f"{grid.name}.packed")
    width = bits if 8 % bits == 0 else 1
    if width == 8:
        value = builder.node("Cast", stored, to=ir.DataType.FLOAT)
    else:
        fields = (np.arange(256)[:, None] >> np.arange(0, 8, width)) & (2**width - 1)
        if width == bits:
            fields = fields * grid.gain + grid.low
        table = builder.once("Cast", builder.constant(fields, np.int8), to=ir.DataType.FLOAT)
        value = builder.node("Gather", table, builder.node("Cast", stored, to=ir.DataType.INT32))
    if codes.size * bits != packed.size * 8:
        value = _first(builder, value, codes.size * bits // width)
    if width != bits:
        # Codes cross bytes: single bits, put together by a product with 1, 2, 4, ...
        value = builder.node("Reshape", value, builder.constant([-1, bits], np.int64))
        value = builder.node("MatMul", value, builder.constant(2.0 ** np.arange(bits)[:, None], np.float32))
    if width != bits or width == 8:
        if grid.gain != 1:
            value = builder.node("Mul", value, builder.constant(grid.gain, np.float32))
        value = builder.node("Add", value, builder.constant(grid.low, np.float32))
    return builder.node("Reshape", value, shape)


def _first(builder: Builder, value: ir.Value, count: int) -> ir.Value:
    """The first ``count`` numbers; the last byte may be half empty."""
    value = builder.node("Reshape", value, builder.constant([-1], np.int64))
    return builder.node("Slice", value, builder.constant([0], np.int64), builder.constant([count], np.int64))
