"""What a quantized layer can run on in OpenVINO with the same codes, and what its time depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from ..quantizers import Quantizer
from ..quantizers.minmax import MinMax
from . import fold, planes, xnor
from .activations import SIGNS
from .builder import array_of
from .graph import MARK
from .kernels import Kind


@dataclass(frozen=True)
class Candidates:
    """Ways to compute a layer.

    Args:
        kinds: of kernels, at least one.
        nodes: of the traced graph, one for each time that the layer runs.
        shapes: of those, see ``kernels.choose``; empty if a size is not known or nothing is to be chosen.
    """

    kinds: tuple[Kind, ...]
    nodes: tuple[ir.Node, ...]
    shapes: tuple[str, ...]


def candidates(traced: ir.Model, student: nn.Module) -> dict[str, Candidates]:
    """Of every layer whose weight is quantized, by its qualified name.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
    """
    quantizers = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer)}
    nodes: dict[str, list[tuple[ir.Node, ir.Node]]] = {}
    for mark in traced.graph:
        name = mark.attributes["quantizer"].as_string() if mark.op_type == MARK else ""
        if name and quantizers[name].spec.role == "weight":
            pairs = [(node, mark) for node in fold.layers_of(mark)]
            nodes.setdefault(name.rpartition(".")[0], []).extend(pairs)
    found = {}
    for layer, pairs in nodes.items():
        each = [_kinds(node, mark, quantizers) for node, mark in pairs]
        kinds = tuple(kind for kind in each[0] if all(kind in others for others in each))
        shapes = [_shape(node, mark, quantizers) for node, mark in pairs] if len(kinds) > 1 else []
        known = tuple(shape for shape in shapes if shape)
        found[layer] = Candidates(kinds, tuple(node for node, _ in pairs), known if len(known) == len(shapes) else ())
    return found


def layer_of(node: ir.Node) -> str:
    """The layer that a convolution is, if its weight is quantized; empty for any other node."""
    mark = node.inputs[1].producer() if node.op_type == "Conv" and node.inputs[1] is not None else None
    if mark is None or mark.op_type != MARK:
        return ""
    return mark.attributes["quantizer"].as_string().rpartition(".")[0]


def marker(node: ir.Node) -> ir.Node | None:
    """The activation's marker that a layer reads, if nothing is between them."""
    made_by = node.inputs[0].producer() if node.inputs[0] is not None else None
    return made_by if made_by is not None and made_by.op_type == MARK else None


def _kinds(node: ir.Node, mark: ir.Node, quantizers: Mapping[str, Quantizer]) -> tuple[Kind, ...]:
    weights, weight = quantizers[mark.attributes["quantizer"].as_string()], array_of(mark.inputs[0])
    activation = _activation(node, quantizers)
    kinds: list[Kind] = []
    if activation is None or isinstance(activation, MinMax) or weights.engine == "float":
        return ("float",)
    if not (fold.is_convolution(node, mark) or fold.is_linear(node, mark)):
        return ("float",)
    # -1 and +1 times a scale; DoReFa's single bit is of that kind too, a min-max grid is not.
    is_binary = weights.bits == 1 and node.op_type == "Conv" and weight is not None
    if is_binary and weight is not None and _is_alone(node) and not xnor.refusal(node, weight.shape, _source(node)):
        if isinstance(activation, SIGNS):
            kinds.append("xnor")
        elif planes.serves(activation):
            kinds.append("planes")
    return (*kinds, "int8", "float")


def _activation(node: ir.Node, quantizers: Mapping[str, Quantizer]) -> Quantizer | None:
    """What quantizes a layer's input, behind padding of another kind than zeros or not."""
    value = node.inputs[0]
    made_by = value.producer() if value is not None else None
    while made_by is not None and made_by.op_type == "Pad" and made_by.inputs[0] is not None:
        made_by = made_by.inputs[0].producer()
    if made_by is None or made_by.op_type != MARK:
        return None
    return quantizers[made_by.attributes["quantizer"].as_string()]


def _source(node: ir.Node) -> ir.Value | None:
    """What a layer's activation quantizer reads."""
    mark = marker(node)
    return mark.inputs[0] if mark is not None else None


def _is_alone(node: ir.Node) -> bool:
    """Whether a layer reads its input's marker directly, and nobody else does: bits serve convolutions only."""
    mark = marker(node)
    return mark is not None and all(use.node is node and use.idx == 0 for use in mark.outputs[0].uses())


def _shape(node: ir.Node, mark: ir.Node, quantizers: Mapping[str, Quantizer]) -> str:
    """What a layer's time depends on, in words; empty if a size is not known."""
    source, x, weight = marker(node), node.inputs[0], array_of(mark.inputs[0])
    if source is None or weight is None or x is None or x.shape is None:
        return ""
    sizes = [size for size in x.shape[1:] if isinstance(size, int)]
    if len(sizes) < len(x.shape) - 1:
        return ""
    activation = quantizers[source.attributes["quantizer"].as_string()]
    bits = f"W{quantizers[mark.attributes['quantizer'].as_string()].bits}A{activation.bits}"
    sign = " signs" if isinstance(activation, SIGNS) else ""
    given = f"{bits}{sign} {'conv' if node.op_type == 'Conv' else 'linear'} {_by(sizes)}"
    if node.op_type != "Conv":
        return f"{given} to {len(weight)}"
    lists = [
        f"{name} {_by(node.attributes[name].as_ints())}"
        for name in ("strides", "pads", "dilations")
        if name in node.attributes
    ]
    lists += [f"groups {node.attributes.get_int('group', 1)}"]
    return ", ".join([f"{given} to {len(weight)}", f"kernel {_by(weight.shape[2:])}", *lists])


def _by(sizes: object) -> str:
    return "x".join(str(int(size)) for size in sizes)  # type: ignore[attr-defined]
