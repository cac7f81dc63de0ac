"""A thin hand on ``onnx_ir``: new nodes, shared constants, and a few questions about a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


class Builder:
    """Adds nodes and constants to a graph; equal constants are stored once.

    Nodes are appended: whoever is done calls ``graph.sort()``.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0

    def constant(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None, name: str | None = None) -> ir.Value:
        """An initializer; one that holds the same bytes in the same shape is used again."""
        data = np.ascontiguousarray(array, dtype) if np.ndim(array) else np.asarray(array, dtype)
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            # Names that were taken over from the network stay with the network's values.
            name = name if name is not None and name not in self.graph.initializers else self._name()
            value = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
                shape=ir.Shape(data.shape),
                const_value=ir.tensor(data, name=name),
            )
            self.graph.initializers[name] = value
            self._constants[key] = value
        return self._constants[key]

    def node(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node of the default domain and return its first output."""
        return self.copy(op, inputs, attributes)

    def once(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Like ``node`` of constants, but one that is there already is used again."""
        for use in inputs[0].uses():
            node = use.node
            is_same = node.op_type == op and tuple(node.inputs) == inputs
            if is_same and {name: attribute.value for name, attribute in node.attributes.items()} == attributes:
                return node.outputs[0]
        return self.node(op, *inputs, **attributes)

    def copy(self, op: str, inputs: tuple[ir.Value | None, ...], attributes: Any) -> ir.Value:
        """Like ``node``, with attributes that were taken from another node."""
        return self.append(ir.node(op, inputs, attributes))

    def append(self, node: ir.Node) -> ir.Value:
        """Append a node that was made elsewhere, of another domain for example, and return its first output."""
        node.outputs[0].name = self._name()
        self.graph.append(node)
        return node.outputs[0]

    def _name(self) -> str:
        self._count += 1
        return f"fewbits.{self._count}"


def array_of(value: ir.Value | None) -> Array | None:
    """The numbers of a constant, or None for anything else."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes ``value``, if it is one of ``ops`` of the default domain."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in ops else None


def only_reader(value: ir.Value, *ops: str) -> ir.Node | None:
    """The one node that reads ``value``, if nobody else does and it is one of ``ops``."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    node = next(iter(uses)).node
    return node if node.domain == "" and node.op_type in ops else None


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, the graph's output included, read ``new``."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.old"
        new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
