"""A plain ONNX QDQ graph in the form that TensorRT's explicit quantization takes; see ``placement`` for its rules.

Weights are the trained codes as int8 constants, with a scale for each output channel. Batch norm stays an operator of
its own behind the convolution: engines fold it into their kernels, and no code changes its sign. Activations are
``QuantizeLinear`` and ``DequantizeLinear`` with int8 codes and zero point 0: a grid from ``low`` to ``high`` is taken
as it was trained where both lie in -128..127, which is so for unsigned grids of up to 7 bits. The 256 codes of an
unsigned or lopsided 8-bit grid have no such form; there the codes are uint8, which is ONNX and runs in ONNX Runtime;
``placement`` says that TensorRT will not take it.

Below 8 bits a grid ends at its last code by a Clip in float in front of ``QuantizeLinear``, for TensorRT has no Clip on
integers. A ReLU becomes part of it: rounding is monotone. Biases stay floats: nothing is rounded that was not trained.
The price is paid in ONNX Runtime, which runs these convolutions in float: there ``packed`` is the fast form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ..quantizers import Quantizer
from ..quantizers.minmax import MinMax
from . import activations
from .activations import SIGNS, Cut, steps_of
from .builder import Builder, array_of, only_reader, producer, replace
from .fold import Site, float_grid
from .movement import MOVES
from .onnx import global_pools
from .weights import WeightGrid

MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
HAND_ON = (*MOVES, "MaxPool", "Relu", "Clip")
LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class PlainQDQ:
    """Lowers to QuantizeLinear, DequantizeLinear and float operators."""

    def prepare(self, builder: Builder) -> None:
        """Means over rows and columns are pools."""
        global_pools(builder)

    def activation(
        self, builder: Builder, mark: ir.Node, quantizer: Quantizer, name: str, call: int
    ) -> tuple[ir.Value, Cut]:
        """Clip, QuantizeLinear, DequantizeLinear; a range that is found anew in every batch stays in float."""
        x = mark.inputs[0]
        assert x is not None
        if isinstance(quantizer, MinMax):
            value = activations.dynamic_range(builder, x, quantizer)
            return value, Cut(name, call, value, None)
        if isinstance(quantizer, SIGNS):
            return _signs(builder, x, quantizer, name, call)
        return _uniform(builder, x, quantizer, name, call)

    def between(self, builder: Builder) -> None:
        """Nothing to do: TensorRT moves Q and DQ itself."""

    def convolution(self, builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """The same convolution with a dequantized weight; its batch norm stays behind it."""
        x, bias = conv.inputs[0], array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
        codes, weight, reason = self._weight(builder, grid, 0)
        norm = only_reader(conv.outputs[0], "BatchNormalization")
        if norm is not None or bias is None:
            conv.replace_input_with(1, weight)
            return Site(layer, codes, reason, (norm or conv).outputs[0])
        # As an input of the convolution ONNX Runtime would round it, in front of a quantizer, to units of input step
        # times weight step: 8 % of the codes of a 4-bit layer, half of a 2-bit one's were off.
        shift = builder.constant(bias.reshape(-1, *[1] * (grid.unsigned.ndim - 2)), np.float32)
        value = builder.node("Add", builder.copy("Conv", (x, weight), conv.attributes), shift)
        replace(conv.outputs[0], value)
        return Site(layer, codes, reason, value)

    def linear(self, builder: Builder, node: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """DequantizeLinear, MatMul, Add: the bias of a Gemm ONNX Runtime would round."""
        x, bias = node.inputs[0], array_of(node.inputs[2]) if len(node.inputs) > 2 else None
        codes, weight, reason = self._weight(builder, grid, 1)
        value = builder.node("MatMul", x, weight)
        if bias is not None:
            value = builder.node("Add", value, builder.constant(bias, np.float32))
        replace(node.outputs[0], value)
        return Site(layer, codes, reason, value)

    def values(self, builder: Builder, grid: WeightGrid) -> ir.Value:
        """The quantized values as a float constant."""
        scale = np.broadcast_to(grid.scale, len(grid.unsigned)).reshape([-1] + [1] * (grid.unsigned.ndim - 1))
        return builder.constant(grid.integers * scale + (grid.offset or 0.0), np.float32, f"{grid.name}.values")

    def finish(self, builder: Builder) -> None:
        """Float weights stay floats: with Q and DQ around them ONNX Runtime quantizes them, on a grid of its own.

        It looks for a DequantizeLinear in front of the layer, also behind what only moves values; a maximum that
        changes nothing hides it. TensorRT runs such a layer in float with or without.
        """
        for node in list(builder.graph):
            if node.op_type in MULTIPLY and len(node.inputs) > 1 and _is_constant(node.inputs[1]):
                x = node.inputs[0]
                assert x is not None
                if _is_dequantized(x):
                    node.replace_input_with(0, builder.node("Max", x, builder.constant(LOWEST, np.float32)))

    def _weight(self, builder: Builder, grid: WeightGrid, axis: int) -> tuple[ir.Value, ir.Value, str]:
        """The stored constant, the value that a layer reads (output channels along ``axis``), why that is no int8."""
        if grid.offset is not None or grid.integers.min() < -128 or grid.integers.max() > 127:
            stored = self.values(builder, grid)
            return stored, stored if axis == 0 else builder.node("Transpose", stored, perm=[1, 0]), float_grid(grid)
        stored = builder.constant(grid.integers if axis == 0 else grid.integers.T, np.int8, f"{grid.name}.codes")
        scale = builder.constant(np.broadcast_to(grid.scale, len(grid.unsigned)), np.float32)
        zero_points = builder.constant(np.zeros(len(grid.unsigned)), np.int8)
        return stored, builder.node("DequantizeLinear", stored, scale, zero_points, axis=axis), ""


def _is_constant(value: ir.Value | None) -> bool:
    """Whether an engine can work out ``value`` when it loads the file, and it is no DequantizeLinear."""
    if value is None or value.const_value is not None:
        return value is not None
    node = value.producer()
    return node is not None and node.op_type != "DequantizeLinear" and all(map(_is_constant, node.inputs))


def _is_dequantized(value: ir.Value) -> bool:
    while (node := producer(value, *HAND_ON)) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return producer(value, "DequantizeLinear") is not None


def _signs(builder: Builder, x: ir.Value, quantizer: Quantizer, name: str, call: int) -> tuple[ir.Value, Cut]:
    """-1 and +1; QuantizeLinear alone would round the tie at zero down."""
    ends = (builder.constant(end, np.float32) for end in (1.0, -1.0))
    value = builder.node("Where", activations.is_plus(builder, x, quantizer), *ends)
    return _pair(builder, value, 1.0, 1.0, 0, True, name, call)


def _uniform(builder: Builder, x: ir.Value, quantizer: Quantizer, name: str, call: int) -> tuple[ir.Value, Cut]:
    zero = quantizer.encode(torch.zeros(()))
    step, lower_end = steps_of(quantizer)
    lowest, highest = zero.low, zero.high
    while (node := producer(x, "Relu", "Clip")) is not None and activations.only_reader_of(x):
        bounds = activations.bounds_of(node)
        if bounds is None:
            break
        codes = quantizer.encode(torch.tensor(bounds)).integers
        lowest, highest = (min(max(int(code), lowest), highest) for code in codes)
        assert node.inputs[0] is not None
        x = node.inputs[0]
    is_signed = lowest >= -128 and highest <= 127
    zero_point = 0 if is_signed else -zero.low
    if lower_end != 0.0:
        x = builder.node("Sub", x, builder.constant(lower_end, np.float32))
    ends = [builder.constant(end * step, np.float32) for end in (lowest, highest)]
    if is_signed and (lowest, highest) == (0, 127):
        x = builder.node("Relu", x)
    elif highest - lowest < 255:
        x = builder.node("Clip", x, *ends)
    elif producer(x, "DequantizeLinear") is not None:
        # QuantizeLinear saturates where this grid ends. But of two pairs in a row ONNX Runtime makes one, on another
        # grid, and it sees through a Relu and a Clip that change nothing.
        x = builder.node("Max", x, ends[0])
    return _pair(builder, x, step, float(zero.scale), zero_point, is_signed, name, call)


def _pair(
    builder: Builder, x: ir.Value, step: float, scale: float, zero_point: int, is_signed: bool, name: str, call: int
) -> tuple[ir.Value, Cut]:
    zero = builder.constant(zero_point, np.int8 if is_signed else np.uint8)
    codes = builder.node("QuantizeLinear", x, builder.constant(step, np.float32), zero)
    value = builder.node("DequantizeLinear", codes, builder.constant(scale, np.float32), zero)
    return value, Cut(name, call, codes, zero_point, is_signed=is_signed)
