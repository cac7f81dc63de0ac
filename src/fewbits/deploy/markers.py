"""The way through a traced graph that all engines share: activation markers, then the layers behind weight markers.

An engine says what a quantizer becomes (``Lowering``); the order, the bookkeeping and the cleaning up are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from ..quantizers import Quantizer
from . import fold, weights
from .activations import Cut
from .builder import Builder, array_of, producer, replace
from .compact import compact
from .fold import Site
from .graph import MARK
from .weights import WeightGrid


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
        while (node := producer(value, "Clip", "QuantizeLinear", "MaxPool", "Reshape")) is not None:
            value = node.inputs[0]
        return next((site.layer for site in self.sites if site.result is value), None)


class Lowering(Protocol):
    """What an engine makes of quantizers and quantized layers."""

    def prepare(self, builder: Builder) -> None:
        """Before anything is replaced."""

    def activation(
        self, builder: Builder, mark: ir.Node, quantizer: Quantizer, name: str, call: int
    ) -> tuple[ir.Value, Cut]:
        """What run number ``call`` of an activation quantizer becomes, and where to compare."""

    def between(self, builder: Builder) -> None:
        """When every activation is settled, and the weights' markers still stand."""

    def convolution(self, builder: Builder, conv: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """Replace a convolution that reads a weight's marker."""

    def linear(self, builder: Builder, node: ir.Node, grid: WeightGrid, layer: str) -> Site:
        """Replace a Gemm, or a MatMul with the transpose of a weight's marker."""

    def values(self, builder: Builder, grid: WeightGrid) -> ir.Value:
        """The weight in float, for whatever else reads it."""

    def finish(self, builder: Builder) -> None:
        """When every layer is replaced."""


def build(traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], lowering: Lowering) -> Built:
    """Replace every marker of a copy of ``traced``.

    Args:
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        metadata: goes into the file.
        lowering: the engine's.
    """
    model = traced.clone()
    builder = Builder(model.graph)
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}
    marks = sorted(
        (node for node in model.graph if node.op_type == MARK), key=lambda node: node.attributes["call"].as_int()
    )
    lowering.prepare(builder)
    cuts, calls = [], dict.fromkeys(quantizers, 0)
    for mark in marks:
        name = mark.attributes["quantizer"].as_string()
        if quantizers[name].spec.role == "activation":
            value, cut = lowering.activation(builder, mark, quantizers[name], name, calls[name])
            replace(mark.outputs[0], value)
            # The weight's marker still stands: only what activations read is settled here.
            builder.graph.remove(mark, safe=True)
            cuts.append(cut)
            calls[name] += 1
    RemoveUnusedNodesPass()(model)
    lowering.between(builder)
    sites: list[Site] = []
    for mark in marks:
        name = mark.attributes["quantizer"].as_string()
        if quantizers[name].spec.role == "weight":
            sites += _layers(builder, mark, quantizers[name], name.rpartition(".")[0], lowering)
    lowering.finish(builder)
    for mark in marks:
        if mark.graph is not None:
            builder.graph.remove(mark)
    return Built(compact(model, metadata), tuple(cuts), tuple(sites))


def _layers(builder: Builder, mark: ir.Node, quantizer: Quantizer, layer: str, lowering: Lowering) -> list[Site]:
    weight = array_of(mark.inputs[0])
    assert weight is not None, f"{layer} quantizes a weight that is no parameter"
    grid = weights.encode(quantizer, torch.from_numpy(weight.copy()), f"{layer}.weight")
    sites = []
    for node in fold.layers_of(mark):
        if fold.is_convolution(node, mark):
            sites.append(lowering.convolution(builder, node, grid, layer))
        elif fold.is_linear(node, mark):
            sites.append(lowering.linear(builder, node, grid, layer))
        else:
            value = lowering.values(builder, grid)
            replace(mark.outputs[0], value)
            reason = f"its weight goes into {node.op_type}, which has no integer kernel here"
            return [Site(layer, value, reason, node.outputs[0])]
    return sites
