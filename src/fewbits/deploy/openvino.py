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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..integers import Floats
from ..quantizers import Quantizer
from ..quantizers.minmax import MinMax
from . import kernels, markers, planes, xnor
from .activations import GRID, SIGNS, Bits, Cut, Grid, dynamic_range, steps_of
from .builder import Builder, array_of, producer, replace
from .candidates import candidates, layer_of
from .fold import Site, behind
from .graph import MARK
from .kernels import Kind
from .markers import Built
from .movement import MOVES
from .openvino_weights import fake_quantize, fits, values, weight
from .weights import WeightGrid

BITS, SIGN = "fewbits.bits", "fewbits.sign"
"""Keys in a value's ``meta``: the ``Bits`` that it is the first of; of what it is the sign, a float -1 or +1."""

HAND_ON = {*MOVES, "Relu", "Clip", "Pad", "MaxPool", "Concat"}
LEVELS = 256
FARTHEST = 2.0**14
"""So many steps may an interval lie from zero: a rounding boundary is then a float32 to a thousandth of a step."""


@dataclass(frozen=True)
class OpenVINO:
    """Lowers to FakeQuantize and binary convolutions.

    Args:
        quantizers: of the network, by qualified name.
        kinds: of kernels, by layer, see ``kernels.choose``.
    """

    quantizers: Mapping[str, Quantizer]
    kinds: Mapping[str, Kind]

    def prepare(self, builder: Builder) -> None:
        """Nothing to do."""

    def activation(
        self, builder: Builder, mark: ir.Node, quantizer: Quantizer, name: str, call: int
    ) -> tuple[ir.Value, Cut]:
        """The operators that do what ``quantizer`` does, and where to compare."""
        x, readers = mark.inputs[0], {self.kinds.get(layer_of(use.node)) for use in mark.outputs[0].uses()}
        assert x is not None
        if readers in ({"xnor"}, {"planes"}):
            bits = (xnor if readers == {"xnor"} else planes).bits(builder, x, quantizer)
            # Holds the bits until the convolution behind it is replaced; then nobody reads it.
            value = builder.append(ir.node("Bits", bits.values, domain=xnor.DOMAIN))
            value.meta[BITS] = bits
            return value, Cut(name, call, bits.values[0], None, bits=bits)
        return _activation(builder, mark, name, call, self.quantizers)

    def between(self, builder: Builder) -> None:
        """Nothing to do: OpenVINO moves its own dequantizations."""

    def convolution(self, builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """On the XNOR kernel, once or for each plane, on int8, or in float."""
        return _convolution(builder, conv, grid, layer, self.kinds[layer])

    def linear(self, builder: Builder, node: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """On int8 or in float."""
        return _linear(builder, node, grid, layer, self.kinds[layer])

    def values(self, builder: Builder, grid: WeightGrid) -> ir.Value:
        """See ``openvino_weights.values``."""
        return values(builder, grid, grid.unsigned)

    def finish(self, builder: Builder) -> None:
        """What a convolution's weight says anyway is left out: words weigh more than bits in a small network."""
        for node in builder.graph:
            if node.op_type == "Conv" and node.domain == "":
                node.attributes.pop("kernel_shape", None)


def build(traced: ir.Model, student: nn.Module, metadata: Mapping[str, str]) -> Built:
    """Replace every marker of a copy of ``traced``.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        metadata: goes into the file, and says which layers have other kernels than the preferred ones.

    Raises:
        ValueError: a layer cannot have the kernel that ``metadata`` give it.
    """
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}
    kinds = {layer: found.kinds for layer, found in candidates(traced, student).items()}
    return markers.build(traced, student, metadata, OpenVINO(quantizers, kernels.read_written(metadata, kinds)))


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
        above = builder.node("Greater", x, builder.constant(xnor.threshold(x, quantizer), np.float32))
        ends = (builder.constant(end, np.float32) for end in (1.0, -1.0))
        bounds = (-LEVELS / 2, LEVELS / 2 - 1)
        value = fake_quantize(builder, builder.node("Where", above, *ends), bounds, bounds, LEVELS)
        value.meta[SIGN] = x
        return value, Cut(name, call, value, None)
    zero = quantizer.encode(torch.zeros(()))
    scale, lowest, highest = float(zero.scale), zero.low, zero.high
    step, shift = steps_of(quantizer)
    is_added = lowest < 0 and any(use.node.op_type == "Add" for use in mark.outputs[0].uses())
    is_averaged = not all(_is_requantized(v, quantizers) for v in _averages(mark.outputs[0]))
    if is_added or is_averaged or _is_clipped(mark.outputs[0]):
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
    a code itself, unless a FakeQuantize follows it (2 % of the codes behind a batch norm were wrong, now none). And a
    Clip of 8-bit codes moves its bounds onto their grid (27 % of the codes behind one were wrong, now none).
    """
    if shift:
        x = builder.node("Sub", x, builder.constant(shift, np.float32))
    value = builder.node("Mul", x, builder.constant(1 / step, np.float32))
    ends = (builder.constant(float(end), np.float32) for end in (lowest, highest))
    return builder.node("Clip", builder.node("Round", value), *ends)


def _is_clipped(value: ir.Value) -> bool:
    """Whether a Clip reads ``value``, behind what hands it on."""
    return any(
        node.op_type == "Clip" or (node.op_type in HAND_ON and _is_clipped(node.outputs[0]))
        for node in (use.node for use in value.uses())
    )


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


def _convolution(builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str, kind: Kind) -> Site:
    x, bias = conv.inputs[0], array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    assert x is not None
    affine = behind(conv.outputs[0], np.zeros(len(grid.unsigned)) if bias is None else bias.astype(np.float64))
    bits: Bits | None = x.meta.get(BITS)
    reason, products = "", tuple[ir.Value, ...]()
    if bits is not None:
        if kind == "planes":
            result, products, unit = planes.convolution(builder, bits, conv, grid)
        else:
            result, unit = xnor.convolution(builder, bits.values[0], conv, grid), 1.0
        scale = _channels(grid.scale * affine.factor * unit, affine.factor)
        value = builder.node("Mul", result, builder.constant(scale, np.float32))
    else:
        made = _float_weight(builder, grid, affine.factor) if kind == "float" else weight(builder, grid, affine.factor)
        value = result = builder.copy("Conv", (x, made), conv.attributes)
        reason = _reason(x, grid, kind)
    sign_of, note = _unpadded(x).meta.get(SIGN), ""
    if grid.bits == 1 and grid.offset is None and sign_of is not None and bits is None:
        note = xnor.refusal(conv, grid.unsigned.shape, sign_of) or "its input is padded, or read by others"
    if affine.shift.any():
        value = builder.node("Add", value, builder.constant(_channels(affine.shift, affine.factor), np.float32))
    replace(affine.end, value)
    return Site(layer, result, reason, result, note, products)


def _linear(builder: Builder, node: ir.Node, grid: WeightGrid, layer: str, kind: Kind) -> Site:
    x = node.inputs[0]
    assert x is not None
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    ones = np.ones(len(grid.unsigned))
    if kind == "float":
        made = builder.node("Transpose", _float_weight(builder, grid, ones), perm=[1, 0])
    else:
        made = weight(builder, grid, ones, transposed=True)
    result = value = builder.node("MatMul", x, made)
    if bias is not None:
        value = builder.node("Add", value, builder.constant(bias, np.float32))
    replace(node.outputs[0], value)
    return Site(layer, result, _reason(x, grid, kind), result)


def _float_weight(builder: Builder, grid: WeightGrid, factor: Floats) -> ir.Value:
    """The weight times a factor for each output channel, on no grid that OpenVINO could see."""
    shape = [-1] + [1] * (grid.unsigned.ndim - 1)
    value = values(builder, grid, grid.unsigned)
    return builder.node("Mul", value, builder.constant(factor.reshape(shape), np.float32))


def _reason(x: ir.Value, grid: WeightGrid, kind: Kind) -> str:
    """Why a layer cannot run on integers; empty if it can."""
    if grid.offset is not None:
        return f"a {grid.bits}-bit grid with a float offset has no int8 form; packed in the file, float in the engine"
    if not fits(grid):
        return f"codes from {grid.integers.min()} to {grid.integers.max()} do not fit into 8 bits with a sign"
    node = _unpadded(x).producer()
    is_fake = node is not None and node.op_type == "FakeQuantize"
    if not is_fake:
        return "its input is not quantized"
    return kernels.FASTER if kind == "float" else ""


def _unpadded(x: ir.Value) -> ir.Value:
    """What padding of another kind than zeros, an operator of its own, was put around."""
    pad = producer(x, "Pad")
    return x if pad is None or pad.inputs[0] is None else _unpadded(pad.inputs[0])


def _channels(numbers: Floats, like: Floats) -> Floats:
    """One number for each channel of a map."""
    return np.broadcast_to(numbers, like.shape).reshape(1, -1, 1, 1)
