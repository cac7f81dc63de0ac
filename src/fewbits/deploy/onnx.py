"""The ONNX file: markers become operators that ONNX Runtime fuses to integer kernels when it loads the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from ..quantizers import Quantizer
from . import activations, fold, weights
from .activations import Cut
from .builder import Builder, array_of, producer, replace
from .compact import compact
from .fold import Care, Site
from .graph import MARK
from .inputs import in_float
from .movement import push_dequantize


@dataclass(frozen=True)
class Built:
    """A finished model and where to look in it.

    Args:
        proto: what is written to the file.
        cuts: activation codes, in the order in which they run.
        sites: quantized layers, in the order in which they run.
    """

    proto: onnx.ModelProto
    cuts: tuple[Cut, ...]
    sites: tuple[Site, ...]

    def layer_before(self, cut: Cut) -> str | None:
        """The layer that gives the values of ``cut``, if one does."""
        value: ir.Value | None = cut.value
        while (node := producer(value, "Clip", "QuantizeLinear")) is not None:
            value = node.inputs[0]
        return next((site.layer for site in self.sites if site.result is value), None)


def build(
    traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], care: Mapping[str, Care] | None = None
) -> Built:
    """Replace every marker of a copy of ``traced``.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        metadata: goes into the file.
        care: layers that need more than the plain way, see ``Care``.
    """
    model = traced.clone()
    builder = Builder(model.graph)
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}
    marks = sorted(
        (node for node in model.graph if node.op_type == MARK), key=lambda node: node.attributes["call"].as_int()
    )
    _global_pools(builder)
    cuts, calls = [], dict.fromkeys(quantizers, 0)
    for mark in marks:
        name = mark.attributes["quantizer"].as_string()
        quantizer = quantizers[name]
        if quantizer.spec.role == "activation":
            source = mark.inputs[0]
            assert source is not None
            value, cut = activations.lower(builder, source, quantizer, name, calls[name])
            replace(mark.outputs[0], value)
            # The weight's marker still stands: only what activations read is settled here.
            builder.graph.remove(mark, safe=True)
            cuts.append(cut)
            calls[name] += 1
    RemoveUnusedNodesPass()(model)
    push_dequantize(builder)
    sites: list[Site] = []
    for mark in marks:
        name = mark.attributes["quantizer"].as_string()
        if quantizers[name].spec.role == "weight":
            layer = name.rpartition(".")[0]
            sites += _weights(builder, mark, quantizers[name], layer, (care or {}).get(layer, Care.PLAIN))
    _float_weights(builder)
    for mark in marks:
        if mark.graph is not None:
            builder.graph.remove(mark)
    proto = compact(model, metadata, keep=[*(c.value for c in cuts), *(s.weight for s in sites)])
    return Built(proto, tuple(cuts), tuple(sites))


def _weights(builder: Builder, mark: ir.Node, quantizer: Quantizer, layer: str, care: Care) -> list[Site]:
    parameter = mark.inputs[0]
    assert parameter is not None
    weight = array_of(parameter)
    assert weight is not None, f"{layer} quantizes a weight that is no parameter"
    grid = weights.encode(quantizer, torch.from_numpy(weight.copy()), f"{layer}.weight")
    sites = []
    for node in fold.layers_of(mark):
        if fold.is_convolution(node, mark):
            sites.append(fold.lower_convolution(builder, node, grid, layer, care))
        elif fold.is_linear(node, mark):
            sites.append(fold.lower_linear(builder, node, grid, layer, care))
        else:
            value = weights.decoded(builder, grid)
            replace(mark.outputs[0], value)
            reason = f"its weight goes into {node.op_type}, which has no integer kernel here"
            return [Site(layer, value, reason, node.outputs[0])]
    return sites


def _float_weights(builder: Builder) -> None:
    """Layers whose weight is not quantized must not be quantized by the engine."""
    for node in list(builder.graph):
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.inputs) > 1 and array_of(node.inputs[1]) is not None:
            x = node.inputs[0]
            assert x is not None
            node.replace_input_with(0, in_float(builder, x))


def _global_pools(builder: Builder) -> None:
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
        kind = onnx.TensorProto.FLOAT if cut.zero_point is None else onnx.TensorProto.UINT8
        sizes: list[str | int | None] = [f"{name}.N", *shapes[name]]
        copy.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}.in", kind, sizes))
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return copy
