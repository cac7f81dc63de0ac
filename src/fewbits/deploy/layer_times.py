"""Times of single layers on every kernel that they can have in OpenVINO, for the table that ``kernels`` keeps.

A layer is measured alone, behind a ReLU: an engine fuses an 8-bit quantizer to what is in front of it, as it does in
the network, where comparisons for binary kernels stay by themselves. What it would fuse behind the layer is not seen.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from torch import nn

from . import kernels, openvino
from .candidates import Candidates, marker
from .graph import DOMAIN, INPUT, OPSET, OUTPUT
from .kernels import Kind
from .openvino_runtime import Compiled, convert

ROUNDS = 3
"""How often each kernel's turn comes; what slows the machine down for a while then hits all of them."""

STEADY = 1.5
"""A turn may take so much longer than another before somebody hears of it."""

WARM_UP = 3
IR_VERSION = 10


def measure(
    found: Mapping[str, Candidates], student: nn.Module, *, threads: int, repeats: int
) -> dict[str, dict[Kind, float]]:
    """Milliseconds of each shape on each kernel, one image, each shape once: the least of interleaved turns.

    Args:
        found: layers of the student's traced graph, from ``candidates``.
        student: whose quantizers they are.
        threads: of the engine.
        repeats: measurements of each shape on each kernel.
    """
    times: dict[str, dict[Kind, float]] = {}
    unsteady = 0
    for layer, ways in found.items():
        for shape, node in zip(ways.shapes, ways.nodes, strict=False):
            if shape not in times:
                model = alone(node)
                runs = {kind: _opened(model, student, layer, kind, threads) for kind in ways.kinds}
                turns = _interleaved(runs, repeats)
                # The least, for where other processes run a median is their time slices (measured: 4 ms for 0.4).
                times[shape] = {kind: round(min(values), 5) for kind, values in turns.items()}
                unsteady += any(max(values) > STEADY * min(values) for values in turns.values())
    if unsteady:
        warnings.warn(
            f"times of {unsteady} of {len(times)} layers are unsteady: other processes seem to run beside this one; "
            "measure again when the machine is idle",
            stacklevel=2,
        )
    return times


def alone(node: ir.Node) -> ir.Model:
    """A traced graph of one layer, with its own markers and its own weight, behind a ReLU."""
    source = marker(node)
    assert source is not None
    assert source.inputs[0] is not None
    x = ir.Value(name=INPUT, shape=source.inputs[0].shape, type=ir.TensorType(ir.DataType.FLOAT))
    relu = ir.node("Relu", [x])
    relu.outputs[0].shape, relu.outputs[0].type = x.shape, x.type
    weights: list[ir.Node] = []
    value = node.inputs[1]
    while value is not None and (made_by := value.producer()) is not None:
        weights.insert(0, made_by)
        value = made_by.inputs[0]
    assert value is not None
    weight = ir.Value(name="weight", shape=value.shape, type=value.type, const_value=value.const_value)
    nodes, current = [relu, _copy(source, relu.outputs[0])], weight
    for made_by in weights:
        nodes.append(_copy(made_by, current))
        current = nodes[-1].outputs[0]
    nodes.append(_copy(node, nodes[1].outputs[0], current))
    output = nodes[-1].outputs[0]
    output.name = OUTPUT
    opsets = {"": OPSET, DOMAIN: 1}
    graph = ir.Graph([x], [output], nodes=nodes, initializers=[weight], opset_imports=opsets, name="layer")
    return ir.Model(graph, ir_version=IR_VERSION)


def _copy(node: ir.Node, *inputs: ir.Value) -> ir.Node:
    """A node of another graph that does the same to other values of the same form."""
    made = ir.node(node.op_type, inputs, node.attributes, domain=node.domain)
    made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    return made


def _opened(model: ir.Model, student: nn.Module, layer: str, kind: Kind, threads: int) -> Callable[[], None]:
    """One inference of one image."""
    built = openvino.build(model, student, {kernels.METADATA: json.dumps({layer: kind})})
    network = Compiled(convert(built.proto), threads=threads).network((1,))
    sizes = [port.shape for port in network.inputs]
    images = [np.random.default_rng(0).normal(size=tuple(size)).astype(np.float32) for size in sizes]

    def run() -> None:
        # Nothing is copied in or out: that would take longer than some layers.
        network(images, share_inputs=True, share_outputs=True)

    return run


def _interleaved(runs: Mapping[Kind, Callable[[], None]], repeats: int) -> dict[Kind, list[float]]:
    """The least milliseconds of each turn of each kernel."""
    least: dict[Kind, list[float]] = {kind: [] for kind in runs}
    for turn in range(ROUNDS):
        for kind, run in runs.items():
            for _ in range(WARM_UP):
                run()
            values = []
            for _ in range(max(repeats // ROUNDS + (turn < repeats % ROUNDS), 1)):
                start = time.perf_counter()
                run()
                values.append(1e3 * (time.perf_counter() - start))
            least[kind].append(min(values))
    return least
