"""Whether Q/DQ stand where TensorRT turns them into int8 kernels, read from the finished graph alone.

The rules are those of NVIDIA's pages "Explicit Quantization" (Q/DQ Layer-Placement Recommendations) and of the
operator table of ONNX-TensorRT 10.15 (opsets 9 to 24; TensorRT 11: to 25), as published; TensorRT itself was not run:

- all inputs of weighted operations (convolution, matrix product) are quantized, weights per output channel,
  activations per tensor, symmetrically: int8, zero points 0. UINT8 exists only as a type of inputs and outputs, and
  ``DequantizeLinear`` takes no int32, so that a bias is a float;
- the residual input of an addition is quantized. The other input may come straight from a convolution, which then adds
  in the same kernel; where it is quantized as well, the addition is an int8 kernel of its own;
- layers without weights that read int8 have to give int8: additions, concatenations and averages are quantized behind;
- nothing between a convolution and its batch norm or ReLU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from .builder import Array
from .markers import Built
from .result import Misplaced

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
UNWEIGHTED = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
RECTIFIERS = ("Relu", "Clip", "Max", "LeakyRelu", "PRelu")
MOVES = (
    *("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"),
    *("Slice", "Split", "Gather", "Expand", "Pad"),
)
"""What gives the same before and behind a quantizer: TensorRT moves Q and DQ past it."""

ASYMMETRIC = "its zero point is not 0, and TensorRT quantizes symmetrically only"
WEIGHTS = (".weight.codes", ".weight.values")
"""What the names of layers' weights end in."""


def misplaced(built: Built) -> tuple[Misplaced, ...]:
    """Every node of a finished graph that breaks a rule, in the order of the graph, with the reason.

    Args:
        built: its model is looked at; its cuts say which quantizer a node comes from.
    """
    graph = _Graph(built.proto, {str(cut.value.name): cut.quantizer for cut in built.cuts})
    return tuple(
        Misplaced(graph.name_of(node), node.op_type, reason)
        for node in built.proto.graph.node
        for reason in graph.reasons(node)
    )


def by_layer(built: Built) -> dict[str, str]:
    """Why layers are no int8 kernels: the first thing wrong with each, or with its input's quantizer."""
    found = {row.name: row.reason for row in reversed(misplaced(built))}
    own = {site.layer: found.get(site.layer) or found.get(f"{site.layer}.input_quantizer", "") for site in built.sites}
    return {layer: reason for layer, reason in own.items() if reason}


@dataclass
class _Graph:
    """Who makes and who reads each value."""

    model: onnx.ModelProto
    quantizers: Mapping[str, str]

    def __post_init__(self) -> None:
        self.constants = {t.name: t for t in self.model.graph.initializer}
        self.makers = {name: node for node in self.model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in self.model.graph.output}

    def reasons(self, node: onnx.NodeProto) -> Iterator[str]:
        """Why ``node`` is not as TensorRT wants it."""
        if node.domain:
            yield f"operator of the domain {node.domain}, which is not ONNX's own"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._pair(node)
        elif node.op_type in WEIGHTED:
            yield from self._weighted(node)
        elif node.op_type in UNWEIGHTED:
            yield from self._unweighted(node)
        elif node.op_type in ("Relu", "BatchNormalization") and self._is_quantized_convolution(node.input[0]):
            yield f"a quantizer stands between a convolution and its {node.op_type}, which then is not fused"

    def _pair(self, node: onnx.NodeProto) -> Iterator[str]:
        scale = self._array(node.input[1])
        if scale is None or scale.dtype != np.float32 or not np.isfinite(scale).all() or (scale <= 0).any():
            yield "its scale is no constant of positive float32 numbers"
        zero_point = self._array(node.input[2]) if len(node.input) > 2 else None
        if node.op_type == "DequantizeLinear":
            yield from self._dequantizer(node, zero_point)
            return
        if zero_point is None or zero_point.dtype != np.int8:
            yield (
                "its codes are no int8: a trained grid of 8 bits does not fit there, and TensorRT has no other; "
                "train it with 7 bits (activations, residual and ends of the plan)"
            )
        elif zero_point.any():
            yield ASYMMETRIC
        if scale is not None and scale.size != 1:
            yield "an activation has one scale for the whole tensor"
        others = {reader.op_type for reader in self.readers.get(node.output[0], [])} - {"DequantizeLinear"}
        if others or node.output[0] in self.outputs:
            yield f"its codes are read by {' and '.join(sorted(others)) or 'the output'}, not by DequantizeLinear"

    def _dequantizer(self, node: onnx.NodeProto, zero_point: Array | None) -> Iterator[str]:
        maker = self.makers.get(node.input[0])
        if node.input[0] in self.constants:
            if self.constants[node.input[0]].data_type != onnx.TensorProto.INT8:
                yield "what it dequantizes is a constant of another type than int8"
        elif maker is None or maker.op_type != "QuantizeLinear":
            yield "what it dequantizes comes from no QuantizeLinear"
        # What is wrong with a pair's zero point is said once, of its QuantizeLinear.
        is_said = maker is not None and list(maker.input[2:]) == list(node.input[2:])
        if zero_point is not None and zero_point.any() and not is_said:
            yield ASYMMETRIC

    def _weighted(self, node: onnx.NodeProto) -> Iterator[str]:
        for index, what in ((0, "input"), (1, "weight")):
            if not self._is_dequantized(node.input[index]):
                yield f"its {what} is in float ({self._origin(node.input[index])})"

    def _unweighted(self, node: onnx.NodeProto) -> Iterator[str]:
        inputs = [name for name in node.input if name not in self.constants]
        if node.op_type == "Add" and len(inputs) < 2:
            return  # a bias
        in_float = [name for name in inputs if not self._is_dequantized(name)]
        # A convolution that nothing else reads adds the other, quantized input in its own kernel.
        if node.op_type == "Add" and len(in_float) == 1 and self._is_fusible(in_float[0]):
            in_float = []
        for name in in_float:
            yield f"an input is in float ({self._origin(name)}); residual=7 quantizes what enters it"
        if not in_float and (reader := self._float_reader(node.output[0])):
            yield f"its inputs are int8, but {reader} reads its result in float; int8 has to come out as well"

    def _is_dequantized(self, name: str) -> bool:
        """Whether a value comes from DequantizeLinear, through what TensorRT moves it past."""
        node = self.makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = self.makers.get(node.input[0])
        if node is not None and node.op_type == "Concat":
            return all(map(self._is_dequantized, node.input))
        return node is not None and node.op_type == "DequantizeLinear"

    def _is_fusible(self, name: str) -> bool:
        """A convolution's own result, read once."""
        return self._is_convolution(name) and len(self.readers[name]) == 1 and name not in self.outputs

    def _is_convolution(self, name: str) -> bool:
        """What a convolution or product gives, behind its batch norm and bias."""
        node = self.makers.get(name)
        while node is not None and (node.op_type == "BatchNormalization" or self._is_bias(node)):
            node = self.makers.get(node.input[0])
        return node is not None and node.op_type in WEIGHTED

    def _is_bias(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Add" and node.input[1] in self.constants

    def _is_quantized_convolution(self, name: str) -> bool:
        """Whether a value went from a convolution straight through Q and DQ."""
        for operator in ("DequantizeLinear", "QuantizeLinear"):
            node = self.makers.get(name)
            if node is None or node.op_type != operator:
                return False
            name = node.input[0]
        return self._is_convolution(name)

    def _float_reader(self, name: str) -> str:
        """Who reads a value that is not quantized, behind rectifiers and moves; empty if nobody does."""
        if name in self.outputs:
            return "the output"
        for node in self.readers.get(name, []):
            handed_on = node.op_type in RECTIFIERS or node.op_type in MOVES
            found = self._float_reader(node.output[0]) if handed_on else node.op_type
            if found not in ("", "QuantizeLinear"):
                return found
        return ""

    def _origin(self, name: str) -> str:
        """What makes a value, in words."""
        node = self.makers.get(name)
        while node is not None and node.op_type in MOVES:
            name, node = node.input[0], self.makers.get(node.input[0])
        if node is None:
            return "a constant" if name in self.constants else "the network's input"
        return f"from {node.op_type} {self.name_of(node)}".rstrip()

    def name_of(self, node: onnx.NodeProto) -> str:
        """The quantizer or layer that a node is of, or the layer in front: values have short names that say nothing."""
        for name in (*node.output, *node.input):
            if name in self.quantizers and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                return self.quantizers[name]
        seen, queue = set(), [node]
        while queue:
            found = queue.pop(0)
            for name in found.input:
                maker = self.makers.get(name)
                if name.endswith(WEIGHTS) and name in self.constants:
                    layer = name.rpartition(".weight.")[0]
                    own = found is node or (node.op_type in WEIGHTED and found.output[0] in node.input)
                    return layer if own else f"behind {layer}"
                if maker is not None and maker.output[0] not in seen:
                    seen.add(maker.output[0])
                    queue.append(maker)
        return "in front of every layer"

    def _array(self, name: str) -> Array | None:
        return onnx.numpy_helper.to_array(self.constants[name]) if name in self.constants else None
