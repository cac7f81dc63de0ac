"""Quantized convolutions and linear layers: packed weights; batch norm and bias become scales and an int32 bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import onnx_ir as ir

from ..integers import LARGEST_BIAS, LIFTED_BITS, Floats, largest_factors
from . import integer_bias
from .activations import GRID, Grid
from .builder import Builder, array_of, only_reader, producer, replace
from .inputs import in_float, lifted, repeated
from .integer_bias import OutputGrid
from .movement import MOVES
from .weights import WeightGrid, decoded, unpacked

Attributes = Mapping[str, Any]


STEM_CHANNELS, STEM_COPIES, STEM_WRONG = 4, 8, 1e-4
"""A stem whose rounded bias gives more than this share of wrong codes reads its few channels so many times, and its
factor is shared among the copies. The network was not settled then (``integers.settle_biases``).

What it rounds otherwise than PyTorch (6 in 10,000 codes with one copy, 0.7 with eight) grows from layer to layer: a
2-bit ResNet-20 predicted another class for 4.5 % of the images with one copy and for 0.25 % with eight.
"""


_HAND_ON = {*MOVES, "Relu", "Clip"}


@dataclass(frozen=True)
class Site:
    """Where a layer's arithmetic is in the graph.

    Args:
        layer: qualified name.
        weight: the int8 weights (float for grids that integers cannot serve).
        reason: why no integer kernel serves it; empty if one does.
        result: what the layer gives, batch norm included.
        note: why it has not the kernel that one would expect, where an integer kernel serves it all the same.
        products: the results of its kernels, where ``result`` is put together from several.
    """

    layer: str
    weight: ir.Value
    reason: str
    result: ir.Value
    note: str = ""
    products: tuple[ir.Value, ...] = ()


class Care(IntEnum):
    """How much is spent on a layer, so that its rounded bias gives the trained codes."""

    PLAIN = 0
    LIFTED = 1
    """Its input's codes are shifted up to use all 8 bits (for weights of 5 bits and more this is so at once)."""
    FLOAT = 2
    """No bias is fine enough: the layer runs in float."""


@dataclass(frozen=True)
class _Affine:
    """What follows a convolution, channel by channel: ``y * factor + shift``.

    ``centre`` and ``spread`` are what the batch norm knows about ``y`` without its bias.
    """

    factor: Floats
    shift: Floats
    end: ir.Value
    centre: Floats | None = None
    spread: Floats | None = None


def lower_convolution(builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str, care: Care) -> Site:
    """Replace ``conv`` and the batch norm behind it."""
    x, bias = conv.inputs[0], array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    assert x is not None
    if grid.offset is not None:
        weight = decoded(builder, grid)
        conv.replace_input_with(0, in_float(builder, x))
        conv.replace_input_with(1, weight)
        return Site(layer, weight, float_grid(grid), conv.outputs[0])
    num_channels = len(grid.unsigned)
    affine = behind(conv.outputs[0], np.zeros(num_channels) if bias is None else bias.astype(np.float64))
    reason = _reason(x, affine.end, care)
    made = _integer(builder, x, grid, affine, conv.attributes, care) if reason == "" else None
    if made is None:
        made = _float(builder, in_float(builder, x), grid, affine, conv.attributes)
        reason = reason or "the bias does not fit into int32 beside such small scales"
    value, weight = made
    replace(affine.end, value)
    return Site(layer, weight, reason, value)


def lower_linear(builder: Builder, node: ir.Node, grid: WeightGrid, layer: str, care: Care) -> Site:
    """Replace a Gemm, or the MatMul with a transposed weight that a linear layer on tokens becomes."""
    x = node.inputs[0]
    assert x is not None
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    reason = float_grid(grid) if grid.offset is not None else _reason(x, None, care)
    made = None
    if not reason and node.op_type == "Gemm":
        shift = np.zeros(len(grid.unsigned)) if bias is None else bias.astype(np.float64)
        made = _integer(builder, x, grid, _Affine(np.ones_like(shift), shift, node.outputs[0]), None, care)
        reason = "" if made else "the bias does not fit into int32 beside such small scales"
    if reason:
        weight = builder.node("Transpose", decoded(builder, grid), perm=[1, 0])
        product = builder.node("MatMul", in_float(builder, x), weight)
    elif made is not None:
        product, weight = made
        bias = None
    else:
        # On tokens: multiplied in integers and scaled to float; the bias stays exact in float.
        weight = unpacked(builder, grid, transposed=True)
        scale = grid.scale[0] if grid.scale.size == 1 else grid.scale
        axis = {} if grid.scale.size == 1 else {"axis": 1}
        dequantized = builder.node("DequantizeLinear", weight, builder.constant(scale, np.float32), **axis)
        product = builder.node("MatMul", x, dequantized)
    if bias is not None:
        product = builder.node("Add", product, builder.constant(bias, np.float32))
    replace(node.outputs[0], product)
    return Site(layer, weight, reason, product)


def behind(y: ir.Value, bias: Floats) -> _Affine:
    """Follow a batch norm, and the shift in front of a quantizer, as far as nobody else reads what is between."""
    factor, shift = np.ones_like(bias), bias
    centre = spread = None
    norm = only_reader(y, "BatchNormalization")
    parameters = [array_of(v) for v in norm.inputs[1:5]] if norm is not None else [None]
    if norm is not None and all(p is not None for p in parameters):
        gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
        factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        shift = (bias - mean) * factor + beta
        centre, spread = mean - bias, np.sqrt(variance)
        y = norm.outputs[0]
    offset = only_reader(y, "Sub")
    if offset is not None and offset.inputs[0] is y and only_reader(offset.outputs[0], "QuantizeLinear"):
        number = array_of(offset.inputs[1])
        if number is not None and number.size == 1:
            shift = shift - float(number)
            y = offset.outputs[0]
    return _Affine(factor, shift, y, centre, spread)


def _reason(x: ir.Value, end: ir.Value | None, care: Care) -> str:
    """Why a layer cannot run on integers; empty if it can. A convolution's result, ``end``, has to be quantized."""
    if GRID not in x.meta:
        return "its input is not quantized"
    if care is Care.FLOAT:
        return "an int32 bias is too coarse for its codes to be the trained ones"
    if end is not None and only_reader(end, "QuantizeLinear") is None:
        readers = _readers(end)
        # What a norm reads no quantizer is trained for, whatever the plan says.
        way_out = " (residual=8 quantizes what enters additions)" if {"Add", "Concat"} & set(readers) else ""
        return f"its output is read by {' and '.join(readers)}, not by one quantizer alone{way_out}"
    return ""


def _readers(value: ir.Value) -> list[str]:
    """The operators that read ``value``, behind what only hands it on."""
    found = set() if value.uses() else {"the output"}
    for use in value.uses():
        node = use.node
        found |= set(_readers(node.outputs[0])) if node.op_type in _HAND_ON else {node.op_type}
    if found == {"QuantizeLinear"}:
        return ["several quantizers"] if len(value.uses()) > 1 else ["a quantizer in another shape"]
    return sorted(found)


def float_grid(grid: WeightGrid) -> str:
    """Why a grid with a float offset is not multiplied in integers."""
    return f"a {grid.bits}-bit grid with a float offset has no int8 form; packed in the file, float in the engine"


def _integer(
    builder: Builder,
    x: ir.Value,
    grid: WeightGrid,
    affine: _Affine,
    conv_attributes: Attributes | None,
    care: Care,
) -> tuple[ir.Value, ir.Value] | None:
    """Weights times whole factors, per-channel scales, int32 bias; None where the bias does not fit."""
    step = x.meta[GRID].scale
    if care is Care.LIFTED or grid.bits >= LIFTED_BITS:
        x = lifted(builder, x)
    input_grid: Grid = x.meta[GRID]
    stride = round(step / input_grid.scale)
    largest_input = max(input_grid.highest - min(input_grid.lowest, input_grid.zero_point), 1)
    scale = np.broadcast_to(grid.scale, affine.factor.shape) * np.abs(affine.factor)
    # A channel whose factor or codes are zero is constant: no weights, and a scale that makes the bias exact enough.
    silent = scale < np.finfo(np.float32).tiny / np.float32(1e-6)
    silent |= ~grid.integers.reshape(len(grid.integers), -1).any(1)
    reach = np.abs(grid.integers.reshape(len(grid.integers), -1)).sum(1) * float(largest_input)
    output = _output_grid(affine, np.where(silent, 1.0, scale), input_grid.scale, stride)
    if output is not None:
        bias = affine.shift / (np.where(silent, 1.0, scale) * input_grid.scale)
        silent |= integer_bias.constant_channels(bias, reach, output)
    scale = np.where(silent, np.maximum(np.abs(affine.shift), 1e-6) / input_grid.scale / 2**20, scale)
    bias = affine.shift / (scale * input_grid.scale)
    if np.abs(bias).max() >= LARGEST_BIAS:
        return None
    output = _output_grid(affine, scale, input_grid.scale, stride)
    largest = largest_factors(grid.integers, largest_input)
    choice, copies = integer_bias.choose(bias, largest, output), 1
    if choice.wrong.mean() > STEM_WRONG and _is_stem(grid, conv_attributes):
        copies = STEM_COPIES
        choice = integer_bias.choose(bias, copies * largest, output)
    fits = np.abs(choice.bias) < LARGEST_BIAS
    factors = np.where(fits, choice.factor, 1)
    whole = np.where(fits, choice.bias, np.round(bias)).astype(np.int64)
    scale = scale / factors * np.where(fits, choice.stretch, 1.0)
    signed = np.where(silent, 0, factors * np.where(affine.factor < 0, -1, 1))
    weight = unpacked(builder, grid, signed, transposed=conv_attributes is None, copies=copies)
    if copies > 1:
        x = repeated(builder, x, copies)
    weight_scale = builder.constant(scale, np.float32)
    if conv_attributes is None:
        # Without a zero point of its own the weight would keep ONNX Runtime from its QGemm.
        zero_points = builder.constant(np.zeros(len(scale)), np.int8)
        inputs = [x, builder.node("DequantizeLinear", weight, weight_scale, zero_points, axis=1)]
    else:
        inputs = [x, builder.node("DequantizeLinear", weight, weight_scale, axis=0)]
    if whole.any():
        bias_scale = builder.node("Mul", weight_scale, builder.constant(input_grid.scale, np.float32))
        inputs.append(builder.node("DequantizeLinear", builder.constant(whole, np.int32), bias_scale, axis=0))
    if conv_attributes is None:
        return builder.node("Gemm", *inputs), weight
    return builder.copy("Conv", tuple(inputs), conv_attributes), weight


def _is_stem(grid: WeightGrid, conv_attributes: Attributes | None) -> bool:
    """A convolution on images, whose 8-bit weights leave no room for a factor."""
    if conv_attributes is None or grid.unsigned.shape[1] > STEM_CHANNELS:
        return False
    group = conv_attributes.get("group")
    return grid.bits > 5 and (group is None or group.value == 1)


def _output_grid(affine: _Affine, scale: Floats, input_scale: float, stride: int) -> OutputGrid | None:
    """The grid that a layer's result is rounded to, if it is."""
    quantize = only_reader(affine.end, "QuantizeLinear")
    if quantize is None:
        return None
    step, zero_point = array_of(quantize.inputs[1]), array_of(quantize.inputs[2])
    assert step is not None
    assert zero_point is not None
    lowest, highest = 0, 255
    clip = only_reader(quantize.outputs[0], "Clip")
    if clip is not None:
        lowest, highest = (int(a) for a in map(array_of, clip.inputs[1:3]) if a is not None)
    unit = scale * input_scale
    centre, spread = affine.centre, affine.spread
    if centre is not None and spread is not None:
        # From the convolution's own output to the integer sum, whose sign the batch norm may have turned.
        per_unit = np.abs(affine.factor) / unit
        centre, spread = centre * per_unit * np.sign(affine.factor), spread * per_unit + 1.0
    return OutputGrid(unit / float(step), lowest - int(zero_point), highest - int(zero_point), centre, spread, stride)


def _float(
    builder: Builder, x: ir.Value, grid: WeightGrid, affine: _Affine, attributes: Attributes
) -> tuple[ir.Value, ir.Value]:
    """The same layer where the engine computes in float: weights decoded when it loads, the bias a float one."""
    weight = decoded(builder, dataclasses.replace(grid, scale=grid.scale * affine.factor))
    inputs = [x, weight]
    if affine.shift.any():
        inputs.append(builder.constant(affine.shift, np.float32))
    return builder.copy("Conv", tuple(inputs), attributes), weight


def layers_of(mark: ir.Node) -> list[ir.Node]:
    """The convolutions and products that read a weight marker, behind a transposition or not."""
    found = []
    for use in mark.outputs[0].uses():
        if use.node.op_type == "Transpose":
            found += [u.node for u in use.node.outputs[0].uses()]
        else:
            found.append(use.node)
    return found


def is_convolution(node: ir.Node, mark: ir.Node) -> bool:
    """A convolution whose weight is the marker itself."""
    return node.domain == "" and node.op_type == "Conv" and node.inputs[1] is mark.outputs[0]


def is_linear(node: ir.Node, mark: ir.Node) -> bool:
    """A Gemm or a MatMul that multiplies by the marker's transpose."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.domain == "" and node.op_type == "Gemm":
        attributes = node.attributes
        plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
        return weight is mark.outputs[0] and attributes.get_int("transB", 0) == 1 and plain
    return node.op_type == "MatMul" and producer(weight, "Transpose") is not None
