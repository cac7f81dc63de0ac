"""What unpacks weights, written once: operators that every layer repeats become a function of the file.

Eight operators unpack a layer's weights, some 240 bytes that are the same for each layer of its bits. As a function of
the model (ONNX 1.10 and later) they stand in the file once, and a layer calls it with its own constants. ONNX Runtime
puts functions back in line when it loads a file, before it folds constants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx

DOMAIN = "f"
LEAST_NODES, LEAST_CALLS = 3, 2
"""What is worth a function."""

OUTSIDE = ("DequantizeLinear",)
"""Operators that stay in the graph: what they read keeps its name, by which a layer's kernel is found."""


@dataclass(frozen=True)
class _Tree:
    """Operators that depend on constants alone.

    Args:
        nodes: in the order of the graph; the last one makes ``output``.
        inputs: the constants, in the order in which the operators read them.
        output: what the rest of the graph reads.
    """

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    output: str

    def renamed(self) -> list[onnx.NodeProto]:
        """The operators with names that are the same in every tree of this form."""
        names = {name: f"i{index}" for index, name in enumerate(self.inputs)}
        made = []
        for index, node in enumerate(self.nodes):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            names[node.output[0]] = f"o{index}"
            copy.input[:] = [names[name] if name else "" for name in node.input]
            copy.output[:] = [f"o{index}"]
            made.append(copy)
        return made


def outline(model: onnx.ModelProto) -> None:
    """Replace repeated operators on constants by calls of functions, in place; same values under the same names.

    Only what the rest of the graph reads keeps its name.
    """
    graph = model.graph
    forms: dict[bytes, list[_Tree]] = defaultdict(list)
    for tree in _trees(graph):
        if len(tree.nodes) >= LEAST_NODES:
            forms[b"".join(node.SerializeToString(deterministic=True) for node in tree.renamed())].append(tree)
    calls: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for trees in forms.values():
        if len(trees) < LEAST_CALLS:
            continue
        name = f"{len(model.functions)}"
        body = trees[0].renamed()
        inputs = [f"i{index}" for index in range(len(trees[0].inputs))]
        model.functions.append(
            onnx.helper.make_function(DOMAIN, name, inputs, [body[-1].output[0]], body, model.opset_import)
        )
        for tree in trees:
            calls[tree.output] = onnx.helper.make_node(name, tree.inputs, [tree.output], domain=DOMAIN)
            gone |= {node.output[0] for node in tree.nodes}
    if not calls:
        return
    kept = []
    for node in graph.node:
        if node.output[0] in calls:
            kept.append(calls[node.output[0]])
        elif node.output[0] not in gone:
            kept.append(node)
    nodes = [_copy(node) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _trees(graph: onnx.GraphProto) -> Iterator[_Tree]:
    """The largest trees of operators on constants whose values nobody else reads."""
    made = {node.output[0]: node for node in graph.node if len(node.output) == 1}
    constant = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
        if node.output[0] in made and node.op_type not in OUTSIDE and node.input and _are(node.input, constant):
            constant.add(node.output[0])
    results = {port.name for port in graph.output}
    order = {node.output[0]: index for index, node in enumerate(graph.node)}
    for name, node in made.items():
        if name not in constant or name in results or all(r.output[0] in constant for r in readers[name]):
            continue
        nodes = sorted(_above(node, made, constant, readers), key=lambda n: order[n.output[0]])
        inner = {n.output[0] for n in nodes}
        inputs = dict.fromkeys(i for n in nodes for i in n.input if i and i not in inner)
        yield _Tree(tuple(nodes), tuple(inputs), name)


def _above(
    node: onnx.NodeProto,
    made: dict[str, onnx.NodeProto],
    constant: set[str],
    readers: dict[str, list[onnx.NodeProto]],
) -> Iterator[onnx.NodeProto]:
    yield node
    for name in node.input:
        if name in made and name in constant and len(readers[name]) == 1:
            yield from _above(made[name], made, constant, readers)


def _are(inputs: Iterable[str], constant: set[str]) -> bool:
    return all(name in constant for name in inputs if name)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
