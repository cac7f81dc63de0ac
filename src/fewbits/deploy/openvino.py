"""The graph for OpenVINO: markers become FakeQuantize on 256 levels, packed weights a table look-up, 1/1 layers XNOR.

The result is an ONNX model with two operators that ONNX does not have: OpenVINO's own ``FakeQuantize``, which its ONNX
reader knows, and ``fewbits.BinaryConvolution``, which ``openvino_runtime.convert`` turns into OpenVINO's operator. So
everything between the quantizers goes through OpenVINO's own, well-kept converter.

What OpenVINO 2026.4 wants, each found by measuring:

- Activations below 8 bits run on integer kernels only on a grid of 256 levels: a Clip ends them at their last code.
- Packed weights are folded to integers at load only if no uint8 constant meets a Gather or a shift directly: the codes
  are cast to int32, looked up in a table of floats, and put on a grid of 255 levels by a FakeQuantize.
- Convolutions may have float results: a bias stays a float, and additions need no quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from ..quantizers import Quantizer
from ..quantizers.ewgs import EWGSActivation
from ..quantizers.minmax import MinMax
from ..quantizers.rounding import positive
from . import fold, weights, xnor
from .activations import GRID, SIGNS, Cut, Grid, dynamic_range
from .builder import Builder, array_of, producer, replace
from .compact import compact
from .fold import Site, behind
from .graph import MARK
from .onnx import Built
from .packing import pack
from .weights import Floats, Ints, WeightGrid

DOMAIN = "org.openvinotoolkit"
BIT = "fewbits.bit"
"""Key in a value's ``meta``: True if it is 0 and 1 where the quantizer gives -1 and +1, False if it is -1 and +1."""

LEVELS = 256
WEIGHT_LEVELS, LARGEST_WEIGHT = 255, 127


def build(
    traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], binary: xnor.Choice = xnor.Choice.XNOR
) -> Built:
    """Replace every marker of a copy of ``traced``.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        metadata: goes into the file.
        binary: which kernel layers of one-bit weights and activations get.
    """
    model = traced.clone()
    builder = Builder(model.graph)
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}
    marks = sorted(
        (node for node in model.graph if node.op_type == MARK), key=lambda node: node.attributes["call"].as_int()
    )
    cuts, calls = [], dict.fromkeys(quantizers, 0)
    for mark in marks:
        name = mark.attributes["quantizer"].as_string()
        quantizer = quantizers[name]
        if quantizer.spec.role == "activation":
            value, cut = _activation(builder, mark, quantizer, name, calls[name], _all_binary(mark, quantizers, binary))
            replace(mark.outputs[0], value)
            builder.graph.remove(mark, safe=True)
            cuts.append(cut)
            calls[name] += 1
    RemoveUnusedNodesPass()(model)
    sites: list[Site] = []
    for mark in marks:
        name = mark.attributes["quantizer"].as_string()
        if quantizers[name].spec.role == "weight":
            sites += _layer(builder, mark, quantizers[name], name.rpartition(".")[0])
    for mark in marks:
        if mark.graph is not None:
            builder.graph.remove(mark)
    proto = compact(model, metadata, keep=[*(c.value for c in cuts), *(s.result for s in sites)])
    for domain in sorted({node.domain for node in proto.graph.node} - {""}):
        proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return Built(proto, tuple(cuts), tuple(sites))


def fake_quantize(
    builder: Builder, x: ir.Value, bounds: tuple[Any, Any], outputs: tuple[Any, Any], levels: int
) -> ir.Value:
    """OpenVINO's operator: ``x`` clipped to ``bounds``, rounded to ``levels`` levels, spread over ``outputs``."""
    ends = [builder.constant(end, np.float32) for end in (*bounds, *outputs)]
    node = ir.node("FakeQuantize", [x, *ends], {"levels": levels}, domain=DOMAIN)
    return builder.append(node)


def _all_binary(mark: ir.Node, quantizers: Mapping[str, Quantizer], binary: xnor.Choice) -> bool:
    """Whether everything that reads an activation's marker is a convolution that the XNOR kernel serves."""
    if binary is not xnor.Choice.XNOR:
        return False
    for use in mark.outputs[0].uses():
        if use.node.op_type != "Conv" or use.idx != 0 or _refusal(use.node, quantizers):
            return False
    return True


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
    builder: Builder, mark: ir.Node, quantizer: Quantizer, name: str, call: int, all_binary: bool
) -> tuple[ir.Value, Cut]:
    """The operators that do what ``quantizer`` does, and where to compare."""
    x = mark.inputs[0]
    assert x is not None
    if isinstance(quantizer, MinMax):
        value = dynamic_range(builder, x, quantizer)
        return value, Cut(name, call, value, None)
    if isinstance(quantizer, SIGNS):
        if all_binary:
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
    if lowest < 0 and not shift and any(use.node.op_type == "Add" for use in mark.outputs[0].uses()):
        value = _rounded(builder, x, scale, lowest, highest)
        return value, Cut(name, call, value, None)
    if highest - lowest + 1 < LEVELS:
        ends = (builder.constant(end * step + shift, np.float32) for end in (lowest, highest))
        x = builder.node("Clip", x, *ends)
    last = lowest + LEVELS - 1
    value = fake_quantize(
        builder, x, (lowest * step + shift, last * step + shift), (lowest * scale, last * scale), LEVELS
    )
    value.meta[GRID] = Grid(scale, -lowest, 0, highest - lowest)
    return value, Cut(name, call, value, None)


def _rounded(builder: Builder, x: ir.Value, step: float, lowest: int, highest: int) -> ir.Value:
    """The same grid in single steps, for signed values that are added to others.

    OpenVINO 2026.4 fuses a convolution, a signed FakeQuantize and the addition behind it into one kernel that forgets
    to round (measured: 15 % of the codes behind the addition were wrong; with this form none).
    """
    value = builder.node("Mul", x, builder.constant(1 / step, np.float32))
    ends = (builder.constant(float(end), np.float32) for end in (lowest, highest))
    value = builder.node("Clip", builder.node("Round", value), *ends)
    return builder.node("Mul", value, builder.constant(step, np.float32))


def _layer(builder: Builder, mark: ir.Node, quantizer: Quantizer, layer: str) -> list[Site]:
    weight = array_of(mark.inputs[0])
    assert weight is not None, f"{layer} quantizes a weight that is no parameter"
    grid = weights.encode(quantizer, torch.from_numpy(weight.copy()), f"{layer}.weight")
    sites = []
    for node in fold.layers_of(mark):
        if fold.is_convolution(node, mark):
            sites.append(_convolution(builder, node, grid, layer))
        elif fold.is_linear(node, mark):
            sites.append(_linear(builder, node, grid, layer))
        else:
            value = _values(builder, grid, grid.unsigned)
            replace(mark.outputs[0], value)
            reason = f"its weight goes into {node.op_type}, which has no integer kernel here"
            return [Site(layer, value, reason, node.outputs[0])]
    return sites


def _convolution(builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
    x, bias = conv.inputs[0], array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    assert x is not None
    affine = behind(conv.outputs[0], np.zeros(len(grid.unsigned)) if bias is None else bias.astype(np.float64))
    if x.meta.get(BIT):
        result = xnor.convolution(builder, x, conv, grid)
        scale = _channels(grid.scale * affine.factor, affine.factor)
        value, reason = builder.node("Mul", result, builder.constant(scale, np.float32)), ""
    else:
        weight = _weight(builder, grid, affine.factor)
        value = result = builder.copy("Conv", (x, weight), conv.attributes)
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
    weight = _weight(builder, grid, np.ones(len(grid.unsigned)), transposed=True)
    result = value = builder.node("MatMul", x, weight)
    if bias is not None:
        value = builder.node("Add", value, builder.constant(bias, np.float32))
    replace(node.outputs[0], value)
    return Site(layer, result, _reason(x, grid), result)


def _reason(x: ir.Value, grid: WeightGrid) -> str:
    """Why a layer cannot run on integers; empty if it can."""
    if grid.offset is not None:
        return f"a {grid.bits}-bit grid with a float offset has no int8 form; packed in the file, float in the engine"
    if not _fits(grid):
        return f"codes from {grid.integers.min()} to {grid.integers.max()} do not fit into 8 bits with a sign"
    node = _unpadded(x).producer()
    is_fake = node is not None and node.op_type == "FakeQuantize"
    return "" if is_fake else "its input is not quantized"


def _weight(builder: Builder, grid: WeightGrid, factor: Floats, *, transposed: bool = False) -> ir.Value:
    """The weight times a factor for each output channel, on OpenVINO's grid of 255 levels."""
    codes = grid.unsigned.T if transposed else grid.unsigned
    shape = [1, -1] if transposed else [-1] + [1] * (codes.ndim - 1)
    # Integers are turned where the factor is negative: a grid's output bounds have to rise.
    turned = factor < 0
    scale = (np.broadcast_to(grid.scale, factor.shape) * np.abs(factor)).reshape(shape)
    if grid.offset is not None or not _fits(grid):
        value = builder.node("Mul", _values(builder, grid, codes), builder.constant(factor.reshape(shape), np.float32))
        return value
    value = _integers(builder, grid, codes)
    if turned.any():
        value = builder.node("Mul", value, builder.constant(np.where(turned, -1, 1).reshape(shape), np.float32))
    # A channel that batch norm switches off has no grid of its own; its weights are zero whatever the grid.
    scale = np.where(scale > 0, scale, np.finfo(np.float32).tiny)
    bounds = (-float(LARGEST_WEIGHT), float(LARGEST_WEIGHT))
    return fake_quantize(builder, value, bounds, (bounds[0] * scale, bounds[1] * scale), WEIGHT_LEVELS)


def _unpadded(x: ir.Value) -> ir.Value:
    """What padding of another kind than zeros, an operator of its own, was put around."""
    pad = producer(x, "Pad")
    return x if pad is None or pad.inputs[0] is None else _unpadded(pad.inputs[0])


def _fits(grid: WeightGrid) -> bool:
    return int(np.abs(grid.integers).max(initial=0)) <= LARGEST_WEIGHT


def _values(builder: Builder, grid: WeightGrid, codes: Ints) -> ir.Value:
    """The trained weights as floats."""
    scale = grid.scale if grid.scale.size == 1 else grid.scale.reshape([-1] + [1] * (codes.ndim - 1))
    value = builder.node("Mul", _integers(builder, grid, codes), builder.constant(scale, np.float32))
    return value if grid.offset is None else builder.node("Add", value, builder.constant(grid.offset, np.float32))


def _integers(builder: Builder, grid: WeightGrid, codes: Ints) -> ir.Value:
    """What an engine multiplies, as floats, from packed codes: a byte is looked up in a table of the codes in it."""
    bits, shape = grid.bits, builder.constant(codes.shape, np.int64)
    packed = pack(codes, bits)
    stored = builder.constant(packed, np.uint8, f"{grid.name}.packed")
    value = builder.node("Cast", stored, to=ir.DataType.INT32)
    width = bits if 8 % bits == 0 else 1
    if width < 8:
        fields = (np.arange(256)[:, None] >> np.arange(0, 8, width)) & (2**width - 1)
        table = builder.node("Cast", builder.constant(fields, np.uint8), to=ir.DataType.INT32)
        value = builder.node("Gather", table, value)
    value = builder.node("Cast", value, to=ir.DataType.FLOAT)
    if codes.size * bits != packed.size * 8:
        value = _first(builder, value, codes.size * bits // width)
    if width != bits:
        # Codes cross bytes: single bits, put together by a product with 1, 2, 4, ...
        value = builder.node("Reshape", value, builder.constant([-1, bits], np.int64))
        value = builder.node("MatMul", value, builder.constant(2.0 ** np.arange(bits)[:, None], np.float32))
    if grid.gain != 1:
        value = builder.node("Mul", value, builder.constant(grid.gain, np.float32))
    value = builder.node("Add", value, builder.constant(grid.low, np.float32))
    return builder.node("Reshape", value, shape)


def _first(builder: Builder, value: ir.Value, count: int) -> ir.Value:
    """The first ``count`` numbers; the last byte may be half empty."""
    value = builder.node("Reshape", value, builder.constant([-1], np.int64))
    return builder.node("Slice", value, builder.constant([0], np.int64), builder.constant([count], np.int64))


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
