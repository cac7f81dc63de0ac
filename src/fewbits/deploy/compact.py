"""A small file: no names nobody reads, no shapes an engine infers, nothing that says when or where it was made."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_DEFAULTS: dict[str, dict[str, object]] = {
    "Conv": {"group": 1, "auto_pad": "NOTSET"},
    "Pad": {"mode": "constant"},
    "Reshape": {"allowzero": 0},
    "MaxPool": {"storage_order": 0, "ceil_mode": 0, "auto_pad": "NOTSET"},
    "AveragePool": {"count_include_pad": 0, "ceil_mode": 0, "auto_pad": "NOTSET"},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
}
"""Attributes that say what the standard says anyway; lists of ones (dilations, strides) and of zeros (pads) as well."""

_UNIT_LISTS = {"dilations": 1, "strides": 1, "pads": 0}
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def compact(model: ir.Model, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Sort, strip and serialize ``model``; the same network gives the same bytes. Values know their new, short names.

    Args:
        model: changed in place.
        metadata: key-value pairs of the file.
    """
    graph = model.graph
    graph.sort()
    RemoveUnusedNodesPass()(model)
    read = {value for node in graph for value in node.inputs} | set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if value not in read:
            del graph.initializers[name]
    _rename(graph)
    for node in graph:
        node.name = None
        _drop_defaults(node)
    model.opset_imports.clear()
    model.opset_imports[""] = graph.opset_imports.get("", 21)
    for domain in sorted({node.domain for node in graph} - {""}):
        model.opset_imports[domain] = 1
    model.functions.clear()
    graph.name = "g"
    model.producer_name, model.producer_version = "fewbits", None
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    proto = ir.to_proto(model)
    _strip(proto)
    return proto


def _rename(graph: ir.Graph) -> None:
    count = 0
    interface = {*graph.inputs, *graph.outputs}
    for node in graph:
        for output in node.outputs:
            if output not in interface:
                # Digits first: such a name cannot meet a parameter's.
                output.name = _short(count)
                count += 1
    for name, value in list(graph.initializers.items()):
        if name.startswith(("fewbits.", "val_")) or value.name is None:
            del graph.initializers[name]
            value.name = f"_{_short(count)}"
            if value.const_value is not None:
                value.const_value.name = value.name
            graph.initializers[value.name] = value
            count += 1


def _short(number: int) -> str:
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
        if number == 0:
            return digits


def _drop_defaults(node: ir.Node) -> None:
    defaults = _DEFAULTS.get(node.op_type)
    for name, attribute in list(node.attributes.items()):
        value = attribute.value
        if defaults is None:
            continue
        unit = _UNIT_LISTS.get(name)
        listed = unit is not None and isinstance(value, list | tuple) and all(v == unit for v in value)
        if listed or (name in defaults and value == defaults[name]):
            del node.attributes[name]


def _strip(proto: onnx.ModelProto) -> None:
    del proto.graph.value_info[:]
    proto.ClearField("producer_version")
    proto.graph.ClearField("doc_string")
    proto.graph.ClearField("metadata_props")
    for node in proto.graph.node:
        for field in ("name", "doc_string", "metadata_props"):
            node.ClearField(field)
    for value in (*proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
        first = value.type.tensor_type.shape.dim
        if first:
            first[0].dim_param = "N"
    for tensor in proto.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
