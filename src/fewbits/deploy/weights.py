"""Weights: trained codes, bit-packed in the file, unpacked by standard operators that an engine folds when it loads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ..integers import Floats, Ints, whole
from ..quantizers import Quantizer
from .builder import Builder
from .packing import pack

_FOUR, _TWO = (ir.DataType.INT4, ir.DataType.UINT4), (ir.DataType.INT2, ir.DataType.UINT2)
_OWN = {4: _FOUR, 3: _FOUR, 2: _TWO}
"""ONNX's own types by bits, with and without a sign."""


@dataclass(frozen=True)
class WeightGrid:
    """Quantized weights: ``(unsigned * gain + low) * scale + offset``, output channels first.

    Args:
        unsigned: 0 to ``2**bits - 1``, what is packed.
        bits: 1 to 8.
        gain: 2 for grids without a zero level (binary, DoReFa), so that codes stay whole around zero; else 1.
        low: smallest integer that an engine multiplies.
        scale: positive, one number or one for each output channel.
        offset: None where integers are all that an engine needs.
        name: the parameter's qualified name.
        has_own_type: 2 to 4 bits are stored as ONNX's INT2 and INT4 rather than in bytes.
    """

    unsigned: Ints
    bits: int
    gain: int
    low: int
    scale: Floats
    offset: float | None
    name: str
    has_own_type: bool = False

    @property
    def integers(self) -> Ints:
        """What an engine multiplies."""
        return self.unsigned * self.gain + self.low


def encode(quantizer: Quantizer, weight: torch.Tensor, name: str) -> WeightGrid:
    """The trained codes of ``weight``, as the quantizer's ``engine`` says that they can be used."""
    codes, bits = quantizer.encode(weight), quantizer.bits
    if quantizer.engine == "float":
        unsigned = codes.integers.numpy().astype(np.int64) - codes.low
        return WeightGrid(unsigned, bits, 1, 0, codes.scale.double().numpy().reshape(-1), float(codes.offset), name)
    integers, scale = whole(quantizer, codes)
    if quantizer.engine == "shifted":
        low, gain = -quantizer.num_steps, 2
    else:
        low, gain = codes.low, (codes.high - codes.low) // (2**bits - 1) if bits == 1 else 1
    return WeightGrid((integers - low) // gain, bits, gain, low, scale, None, name)


def unpacked(
    builder: Builder, grid: WeightGrid, multiplier: Ints | None = None, *, transposed: bool = False, copies: int = 1
) -> ir.Value:
    """The int8 weights that an engine multiplies.

    Args:
        builder: of the graph.
        grid: the codes.
        multiplier: whole numbers, one for each output channel, that fit the codes into -127..127; None is 1.
        transposed: I x O instead of O x I, as MatMul wants a linear layer's weight.
        copies: input channels are repeated so often, and the copies' multipliers add up to ``multiplier``.
    """
    if copies > 1:
        assert multiplier is not None
        return _copied(builder, unpacked(builder, grid), grid.unsigned.shape, multiplier, copies)
    codes, integers = grid.unsigned, grid.integers
    shape = [-1] + [1] * (codes.ndim - 1)
    factors = np.ones(len(codes), np.int64) if multiplier is None else multiplier
    factors = factors.reshape(shape)
    if transposed:
        codes, integers, factors = codes.T, integers.T, factors.T
    if grid.bits == 8:
        return builder.constant(integers * factors, np.int8, f"{grid.name}.codes")
    if _is_own(grid) and grid.gain == 1:
        stored = builder.constant(integers, _OWN[grid.bits][0].numpy(), f"{grid.name}.codes")
        if (factors == 1).all():
            return builder.node("Cast", stored, to=ir.DataType.INT8)
        value = builder.node("Cast", stored, to=ir.DataType.INT32)
    else:
        value = builder.node("Cast", _codes(builder, codes, grid), to=ir.DataType.INT32)
        if grid.gain != 1:
            value = builder.node("Mul", value, builder.constant(grid.gain, np.int32))
        value = builder.node("Add", value, builder.constant(grid.low, np.int32))
    if (factors != 1).any():
        factor = builder.constant(factors, np.int8)
        value = builder.node("Mul", value, builder.node("Cast", factor, to=ir.DataType.INT32))
    return builder.node("Cast", value, to=ir.DataType.INT8)


def _copied(builder: Builder, weight: ir.Value, shape: tuple[int, ...], multiplier: Ints, copies: int) -> ir.Value:
    """O x I x ... -> O x (copies * I) x ...: the weights once in the file, repeated when it is loaded."""
    num_outputs, num_inputs, *kernel = shape
    shares = (np.abs(multiplier)[:, None] + np.arange(copies)) // copies * np.sign(multiplier)[:, None]
    value = builder.node("Cast", weight, to=ir.DataType.INT32)
    value = builder.node("Reshape", value, builder.constant([num_outputs, 1, num_inputs, *kernel], np.int64))
    factor = builder.constant(shares.reshape(num_outputs, copies, *[1] * (len(shape) - 1)), np.int8)
    value = builder.node("Mul", value, builder.node("Cast", factor, to=ir.DataType.INT32))
    value = builder.node("Reshape", value, builder.constant([num_outputs, copies * num_inputs, *kernel], np.int64))
    return builder.node("Cast", value, to=ir.DataType.INT8)


def decoded(builder: Builder, grid: WeightGrid) -> ir.Value:
    """Float weights from packed codes, for grids that integers cannot serve."""
    value = builder.node("Cast", _codes(builder, grid.unsigned, grid), to=ir.DataType.FLOAT)
    if grid.gain != 1:
        value = builder.node("Mul", value, builder.constant(grid.gain, np.float32))
    if grid.low != 0:
        value = builder.node("Add", value, builder.constant(grid.low, np.float32))
    scale = grid.scale if grid.scale.size == 1 else grid.scale.reshape([-1] + [1] * (grid.unsigned.ndim - 1))
    value = builder.node("Mul", value, builder.constant(scale, np.float32))
    return value if grid.offset is None else builder.node("Add", value, builder.constant(grid.offset, np.float32))


def _is_own(grid: WeightGrid) -> bool:
    return grid.has_own_type and grid.bits in _OWN


def _codes(builder: Builder, codes: Ints, grid: WeightGrid) -> ir.Value:
    """uint8 codes in their shape, from a packed initializer."""
    bits, name = grid.bits, grid.name
    if _is_own(grid):
        stored = builder.constant(codes, _OWN[bits][1].numpy(), f"{name}.codes")
        return builder.node("Cast", stored, to=ir.DataType.UINT8)
    shape = builder.constant(codes.shape, np.int64)
    packed = pack(codes, bits)
    if bits == 8:
        return builder.constant(codes, np.uint8, f"{name}.codes")
    stored = builder.constant(packed[:, None], np.uint8, f"{name}.packed")
    if 8 % bits == 0:
        width, count = bits, codes.size
    else:
        # Codes cross bytes: single bits first, put together below.
        width, count = 1, codes.size * bits
    shifts = builder.constant(np.arange(0, 8, width), np.uint8)
    value = builder.node("BitShift", stored, shifts, direction="RIGHT")
    value = builder.node("BitwiseAnd", value, builder.constant(2**width - 1, np.uint8))
    if count != packed.size * (8 // width):
        value = builder.node("Reshape", value, builder.constant([-1], np.int64))
        value = builder.node("Slice", value, builder.constant([0], np.int64), builder.constant([count], np.int64))
    if width == bits:
        return builder.node("Reshape", value, shape)
    value = builder.node("Reshape", value, builder.constant([-1, bits], np.int64))
    value = builder.node("Cast", value, to=ir.DataType.INT32)
    value = builder.node("MatMul", value, builder.constant(2 ** np.arange(bits)[:, None], np.int32))
    return builder.node("Reshape", builder.node("Cast", value, to=ir.DataType.UINT8), shape)
