"""The graph for OpenVINO: markers become FakeQuantize on 256 levels, packed weights a table look-up, 1/1 layers XNOR.

The result is an ONNX model with two operators that ONNX does not have: OpenVINO's own ``FakeQuantize``, which its ONNX
reader knows, and ``fewbits.BinaryConvolution``, which ``openvino_runtime.convert`` turns into OpenVINO's operator. So
everything between the quantizers goes through OpenVINO's own, well-kept converter.

What OpenVINO 2026.4 wants, each found by measuring:

- Activations below 8 bits run on integer kernels only on a grid of 256 levels: a Clip ends them at their last code.
- Packed weights want a table, see ``openvino_weights``.
- Convolutions may have float results: a bias stays a float, and additions need no quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from ..quantizers import Quantizer
from ..quantizers.ewgs import EWGSActivation
from ..quantizers.minmax import MinMax
from ..quantizers.rounding import positive
from . import markers, xnor
from .activations import GRID, SIGNS, Cut, Grid, dynamic_range
from .builder import Builder, array_of, producer, replace
from .fold import Site, behind
from .graph import MARK
from .markers import Built
from .movement import MOVES
from .openvino_weights import fake_quantize, fits, values, weight
from .weights import Floats, WeightGrid

BIT = "fewbits.bit"
"""Key in a value's ``meta``: True if it is 0 and 1 where the quantizer gives -1 and +1, False if it is -1 and +1."""

HAND_ON = {*MOVES, "Relu", "Clip", "Pad", "MaxPool", "Concat"}
LEVELS = 256
FARTHEST = 2.0**14
"""So many steps may an interval lie from zero: a rounding boundary is then a float32 to a thousandth of a step."""


@dataclass(frozen=True)
class OpenVINO:
    """Lowers to FakeQuantize and binary convolutions.

    Args:
        quantizers: of the network, by qualified name.
    """

    quantizers: Mapping[str, Quantizer]

    def prepare(self, builder: Builder) -> None:
        """Nothing to do."""

    def activation(
        self, builder: Builder, mark: ir.Node, quantizer: Quantizer, name: str, call: int
    ) -> tuple[ir.Value, Cut]:
        """The operators that do what ``quantizer`` does, and where to compare."""
        return _activation(builder, mark, name, call, self.quantizers)

    def between(self, builder: Builder) -> None:
        """Nothing to do: OpenVINO moves its own dequantizations."""

    def convolution(self, builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """On the XNOR kernel, on int8, or in float."""
        return _convolution(builder, conv, grid, layer)

    def linear(self, builder: Builder, node: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """On int8 or in float."""
        return _linear(builder, node, grid, layer)

    def values(self, builder: Builder, grid: WeightGrid) -> ir.Value:
        """See ``openvino_weights.values``."""
        return values(builder, grid, grid.unsigned)

    def finish(self, builder: Builder) -> None:
        """Nothing to do."""


def build(traced: ir.Model, student: nn.Module, metadata: Mapping[str, str]) -> Built:
    """Replace every marker of a copy of ``traced``.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        metadata: goes into the file.
    """
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}
    return markers.build(traced, student, metadata, OpenVINO(quantizers))


def _all_binary(mark: ir.Node, quantizers: Mapping[str, Quantizer]) -> bool:
    """Whether everything that reads an activation's marker is a convolution that the XNOR kernel serves."""
    return all(
        use.node.op_type == "Conv" and use.idx == 0 and not _refusal(use.node, quantizers)
        for use in mark.outputs[0].uses()
    )


def _refusal(conv: ir.Node, quantizers: Mapping[str, Quantizer]) -> str:
    """Why a convolution that reads a weight's marker is none for the XNOR kernel; empty if it is one."""
    mark = conv.inputs[1].producer() if conv.inputs[1] is not None else None
    weight = array_of(mark.inputs[0]) if mark is not None and mark.op_type == MARK else None
    if mark is None or weight is None:
        return "its weights are not quantized"
    quantizer = quantizers[mark.attributes["quantizer"].as_string()]
    # -1 and +1 times a scale; DoReFa's single bit is of that kind too, a min-max grid is not.
    if quantizer.bits != 1 or quantizer.engine == "float":
        return "its weights have more than one bit"
    return xnor.refusal(conv, weight.shape)


def _activation(
    builder: Builder, mark: ir.Node, name: str, call: int, quantizers: Mapping[str, Quantizer]
) -> tuple[ir.Value, Cut]:
    """The operators that do what the quantizer ``name`` does, and where to compare."""
    quantizer, x = quantizers[name], mark.inputs[0]
    assert x is not None
    if isinstance(quantizer, MinMax):
        value = dynamic_range(builder, x, quantizer)
        return value, Cut(name, call, value, None)
    if isinstance(quantizer, SIGNS):
        if _all_binary(mark, quantizers):
            value = xnor.bits(builder, x, quantizer)
            value.meta[BIT] = True
            return value, Cut(name, call, value, None, is_bit=True)
        above = builder.node("Greater", x, builder.constant(xnor.threshold(x, quantizer), np.float32))
        ends = (builder.constant(end, np.float32) for end in (1.0, -1.0))
        bounds = (-LEVELS / 2, LEVELS / 2 - 1)
        value = fake_quantize(builder, builder.node("Where", above, *ends), bounds, bounds, LEVELS)
        value.meta[BIT] = False
        return value, Cut(name, call, value, None)
    zero = quantizer.encode(torch.zeros(()))
    scale, lowest, highest = float(zero.scale), zero.low, zero.high
    step, shift = scale, 0.0
    if isinstance(quantizer, EWGSActivation):
        shift = float(quantizer.lower.detach())
        step = float((positive(quantizer.upper - quantizer.lower) / quantizer.num_steps).detach())
    is_added = lowest < 0 and any(use.node.op_type == "Add" for use in mark.outputs[0].uses())
    if is_added or not all(_is_requantized(v, quantizers) for v in _averages(mark.outputs[0])):
        codes = _codes(builder, x, step, shift, lowest, highest)
        value = builder.node("Mul", codes, builder.constant(scale, np.float32))
        return value, Cut(name, call, value, None)
    if abs(shift) > FARTHEST * step:
        # FakeQuantize takes bounds in float32, which would be one number: OpenVINO 2026.4 then divides by zero, and
        # where it fuses that into a convolution it says "could not append an elementwise post-op".
        x = _codes(builder, x, step, shift, lowest, highest)
        step, shift = 1.0, 0.0
    elif highest - lowest + 1 < LEVELS:
        ends = (builder.constant(end * step + shift, np.float32) for end in (lowest, highest))
        x = builder.node("Clip", x, *ends)
    last = lowest + LEVELS - 1
    value = fake_quantize(
        builder, x, (lowest * step + shift, last * step + shift), (lowest * scale, last * scale), LEVELS
    )
    value.meta[GRID] = Grid(scale, -lowest, 0, highest - lowest)
    return value, Cut(name, call, value, None)


def _codes(builder: Builder, x: ir.Value, step: float, shift: float, lowest: int, highest: int) -> ir.Value:
    """Codes as floats, in single steps, where OpenVINO 2026.4 does wrong with a FakeQuantize.

    A convolution, a signed FakeQuantize and the addition behind it become one kernel that forgets to round (measured:
    15 % of the codes behind the addition were wrong; with this form none). And an average of 8-bit codes is rounded to
    a code itself, unless a FakeQuantize follows it (2 % of the codes behind a batch norm were wrong, now none).
    """
    if shift:
        x = builder.node("Sub", x, builder.constant(shift, np.float32))
    value = builder.node("Mul", x, builder.constant(1 / step, np.float32))
    ends = (builder.constant(float(end), np.float32) for end in (lowest, highest))
    return builder.node("Clip", builder.node("Round", value), *ends)


def _averages(value: ir.Value) -> Iterator[ir.Value]:
    """What average pools make of ``value``."""
    for node in (use.node for use in value.uses()):
        if node.op_type == "AveragePool":
            yield node.outputs[0]
        elif node.op_type in HAND_ON:
            yield from _averages(node.outputs[0])


def _is_requantized(value: ir.Value, quantizers: Mapping[str, Quantizer]) -> bool:
    """Whether quantizers with a grid of their own, and nobody else, read ``value``."""
    return not value.is_graph_output() and all(
        not isinstance(quantizers[node.attributes["quantizer"].as_string()], (MinMax, *SIGNS))
        if node.op_type == MARK
        else node.op_type in HAND_ON and _is_requantized(node.outputs[0], quantizers)
        for node in (use.node for use in value.uses())
    )


def _convolution(builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
    x, bias = conv.inputs[0], array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    assert x is not None
    affine = behind(conv.outputs[0], np.zeros(len(grid.unsigned)) if bias is None else bias.astype(np.float64))
    if x.meta.get(BIT):
        result = xnor.convolution(builder, x, conv, grid)
        scale = _channels(grid.scale * affine.factor, affine.factor)
        value, reason = builder.node("Mul", result, builder.constant(scale, np.float32)), ""
    else:
        made = weight(builder, grid, affine.factor)
        value = result = builder.copy("Conv", (x, made), conv.attributes)
        reason = _reason(x, grid)
    is_binary = grid.bits == 1 and grid.offset is None and _unpadded(x).meta.get(BIT) is False
    note = xnor.refusal(conv, grid.unsigned.shape) or "its input is padded, or read by others" if is_binary else ""
    if affine.shift.any():
        value = builder.node("Add", value, builder.constant(_channels(affine.shift, affine.factor), np.float32))
    replace(affine.end, value)
    return Site(layer, result, reason, result, note)


def _linear(builder: Builder, node: ir.Node, grid: WeightGrid, layer: str) -> Site:
    x = node.inputs[0]
    assert x is not None
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    made = weight(builder, grid, np.ones(len(grid.unsigned)), transposed=True)
    result = value = builder.node("MatMul", x, made)
    if bias is not None:
        value = builder.node("Add", value, builder.constant(bias, np.float32))
    replace(node.outputs[0], value)
    return Site(layer, result, _reason(x, grid), result)


def _reason(x: ir.Value, grid: WeightGrid) -> str:
    """Why a layer cannot run on integers; empty if it can."""
    if grid.offset is not None:
        return f"a {grid.bits}-bit grid with a float offset has no int8 form; packed in the file, float in the engine"
    if not fits(grid):
        return f"codes from {grid.integers.min()} to {grid.integers.max()} do not fit into 8 bits with a sign"
    node = _unpadded(x).producer()
    is_fake = node is not None and node.op_type == "FakeQuantize"
    return "" if is_fake else "its input is not quantized"


def _unpadded(x: ir.Value) -> ir.Value:
    """What padding of another kind than zeros, an operator of its own, was put around."""
    pad = producer(x, "Pad")
    return x if pad is None or pad.inputs[0] is None else _unpadded(pad.inputs[0])


def _channels(numbers: Floats, like: Floats) -> Floats:
    """One number for each channel of a map."""
    return np.broadcast_to(numbers, like.shape).reshape(1, -1, 1, 1)


def cut(model: onnx.ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy that gives the value of every cut, and in which whatever read it reads the input ``NAME.in`` instead.

    What is fed goes through a quantizer of the same grid once more, so that the layers behind keep their kernels.

    Args:
        model: from ``build``.
        cuts: of it.
        shapes: without the batch, by the cuts' names.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {str(c.value.name): c for c in cuts}
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = f"{name}.again"
    makers = {node.output[0]: node for node in copy.graph.node if node.output[0] in names}
    for name, cut in names.items():
        maker, ends = makers[name], list(makers[name].input[1:])
        added = []
        if cut.is_bit:
            # The bits themselves cannot leave the graph; the comparison that makes them can.
            shape = next(list(t.dims) for t in copy.graph.initializer if t.name == ends[0])
            half = onnx.numpy_helper.from_array(np.full(shape, 0.5, np.float32), f"{name}.half")
            copy.graph.initializer.append(half)
            added.append(_again(maker, name, [half.name, half.name, *ends[2:]]))
            maker.CopyFrom(onnx.helper.make_node("Greater", [maker.input[0], ends[0]], [f"{name}.above"]))
            added.append(onnx.helper.make_node("Cast", [f"{name}.above"], [name], to=onnx.TensorProto.FLOAT))
        elif maker.op_type == "FakeQuantize":
            added.append(_again(maker, name, [*ends[2:], *ends[2:]]))
        else:
            added.append(onnx.helper.make_node("Identity", [f"{name}.in"], [f"{name}.again"]))
        for node in added:
            copy.graph.node.append(node)
        sizes: list[str | int | None] = [f"{name}.N", *shapes[name]]
        copy.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}.in", onnx.TensorProto.FLOAT, sizes))
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return copy


def _again(maker: onnx.NodeProto, name: str, ends: Sequence[str]) -> onnx.NodeProto:
    """The same FakeQuantize with other bounds, from what is fed to who reads."""
    node = onnx.NodeProto()
    node.CopyFrom(maker)
    del node.input[:], node.output[:]
    node.input.extend([f"{name}.in", *ends])
    node.output.append(f"{name}.again")
    return node
