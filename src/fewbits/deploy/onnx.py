"""The ONNX file: markers become operators that ONNX Runtime fuses to integer kernels when it loads the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import numpy as np
import onnx
import onnx_ir as ir
from torch import nn

from ..quantizers import Quantizer
from . import activations, fold, markers, weights
from .activations import GRID, Cut, Grid
from .builder import Builder, array_of, replace
from .fold import Care, Site
from .inputs import in_float
from .markers import Built
from .movement import push_dequantize
from .weights import WeightGrid

OPSET_OF_INT2, IR_OF_INT2 = 25, 13
_TWO_BITS = (ir.DataType.INT2, ir.DataType.UINT2)


@dataclass(frozen=True)
class OnnxRuntime:
    """Lowers to QuantizeLinear, integer Clip, DequantizeLinear, and convolutions with an int32 bias.

    Args:
        care: layers that need more than the plain way.
        standard_types: store weights of 2 to 4 bits as ONNX's INT2 and INT4.
    """

    care: Mapping[str, Care]
    standard_types: bool = False

    def prepare(self, builder: Builder) -> None:
        """Means that the engine has a kernel for."""
        global_pools(builder)

    def activation(
        self, builder: Builder, mark: ir.Node, quantizer: Quantizer, name: str, call: int
    ) -> tuple[ir.Value, Cut]:
        """See ``activations.lower``."""
        source = mark.inputs[0]
        assert source is not None
        return activations.lower(builder, source, quantizer, name, call)

    def between(self, builder: Builder) -> None:
        """See ``push_dequantize``."""
        push_dequantize(builder)

    def convolution(self, builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """See ``fold.lower_convolution``."""
        return fold.lower_convolution(builder, conv, self._stored(grid), layer, self.care.get(layer, Care.PLAIN))

    def linear(self, builder: Builder, node: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """See ``fold.lower_linear``."""
        return fold.lower_linear(builder, node, self._stored(grid), layer, self.care.get(layer, Care.PLAIN))

    def values(self, builder: Builder, grid: WeightGrid) -> ir.Value:
        """See ``weights.decoded``."""
        return weights.decoded(builder, self._stored(grid))

    def finish(self, builder: Builder) -> None:
        """Float layers stay float, and a SiLU one operator."""
        _float_weights(builder)
        _whole_silus(builder)

    def _stored(self, grid: WeightGrid) -> WeightGrid:
        return replace_fields(grid, has_own_type=self.standard_types)


def build(
    traced: ir.Model,
    student: nn.Module,
    metadata: Mapping[str, str],
    care: Mapping[str, Care] | None = None,
    *,
    standard_types: bool = False,
) -> Built:
    """Replace every marker of a copy of ``traced``.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        metadata: goes into the file.
        care: layers that need more than the plain way, see ``Care``.
        standard_types: see ``OnnxRuntime``. A Cast stands in front of DequantizeLinear, which ONNX Runtime folds at
            load; without it, 4-bit weights run in float.
    """
    built = markers.build(traced, student, metadata, OnnxRuntime(care or {}, standard_types))
    if any(tensor.data_type in _TWO_BITS for tensor in built.proto.graph.initializer):
        # What is in the graph means the same in both opsets; only the type is new.
        built.proto.opset_import[0].version, built.proto.ir_version = OPSET_OF_INT2, IR_OF_INT2
    return built


def _float_weights(builder: Builder) -> None:
    """Layers whose weight is not quantized must not be quantized by the engine."""
    for node in list(builder.graph):
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.inputs) > 1 and array_of(node.inputs[1]) is not None:
            x = node.inputs[0]
            assert x is not None
            node.replace_input_with(0, in_float(builder, x))


def _whole_silus(builder: Builder) -> None:
    """A SiLU behind a quantizer, written so that ONNX Runtime 1.31 still sees one operator in it (QuickGelu).

    It gives each reader of a DequantizeLinear one of its own, and looks for the SiLU afterwards; so the zero point is
    taken off by a Sub. Measured on EfficientNet-B0 at 8/8: 1.23 of float's latency before, 0.98 with it.
    """
    for node in list(builder.graph):
        if node.op_type != "DequantizeLinear" or GRID not in node.outputs[0].meta:
            continue
        x = node.outputs[0]
        readers = {use.node.op_type: use.node for use in x.uses()}
        if x.is_graph_output() or len(x.uses()) != 2 or readers.keys() != {"Sigmoid", "Mul"}:
            continue
        if readers["Sigmoid"].outputs[0] not in readers["Mul"].inputs:
            continue
        grid: Grid = x.meta[GRID]
        codes, scale = node.inputs[:2]
        unshifted = builder.node("DequantizeLinear", codes, scale, builder.constant(0, np.uint8))
        value = builder.node("Sub", unshifted, builder.constant(grid.scale * grid.zero_point, np.float32))
        replace(x, value)


def global_pools(builder: Builder) -> None:
    """A mean over rows and columns is a global average pool, which has an integer kernel."""
    for node in list(builder.graph):
        if node.op_type != "ReduceMean" or not node.attributes.get_int("keepdims", 1):
            continue
        axes, x = array_of(node.inputs[1]) if len(node.inputs) > 1 else None, node.inputs[0]
        if axes is None or x is None or x.shape is None or len(x.shape) != 4:
            continue
        if {int(a) % 4 for a in axes} == {2, 3}:
            replace(node.outputs[0], builder.node("GlobalAveragePool", x))


def cut(model: onnx.ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy in which every tensor of codes is an output, and what read it reads an input instead.

    Args:
        model: from ``build``.
        cuts: of it.
        shapes: of their values without the batch, by name.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {str(c.value.name): c for c in cuts}
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = f"{name}.in"
    for name, cut in names.items():
        codes = onnx.TensorProto.INT8 if cut.is_signed else onnx.TensorProto.UINT8
        kind = onnx.TensorProto.FLOAT if cut.zero_point is None else codes
        sizes: list[str | int | None] = [f"{name}.N", *shapes[name]]
        copy.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}.in", kind, sizes))
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return copy
