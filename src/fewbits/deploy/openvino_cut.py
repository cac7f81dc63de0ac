"""The graph for OpenVINO cut at every activation, so that each layer can be fed PyTorch's own codes; see ``parity``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from .activations import Bits, Cut


def cut(model: onnx.ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy that gives the value of every cut, and in which whatever read it reads the input ``NAME.in`` instead.

    What is fed goes through a quantizer of the same grid once more, so that the layers behind keep their kernels.

    Args:
        model: from ``openvino.build``.
        cuts: of it.
        shapes: without the batch, by the cuts' names.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {str(value.name) for c in cuts for value in (c.bits.values if c.bits is not None else [c.value])}
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = f"{name}.again"
    makers = {node.output[0]: node for node in copy.graph.node if node.output[0] in names}
    for cut in cuts:
        name = str(cut.value.name)
        maker = makers[name]
        if cut.bits is not None:
            added = _bits(copy.graph, cut.bits, [makers[str(value.name)] for value in cut.bits.values])
        elif maker.op_type == "FakeQuantize":
            ends = list(maker.input[3:])
            added = [_again(maker, name, f"{name}.in", [*ends, *ends])]
        else:
            added = [onnx.helper.make_node("Identity", [f"{name}.in"], [f"{name}.again"])]
        copy.graph.node.extend(added)
        sizes: list[str | int | None] = [f"{name}.N", *shapes[name]]
        copy.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}.in", onnx.TensorProto.FLOAT, sizes))
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return copy


def _bits(graph: onnx.GraphProto, bits: Bits, makers: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Bits cannot leave the graph: the comparisons that make them do, put together to what they stand for."""
    first = str(makers[0].output[0])
    added, counted = [], ""
    for step, maker in enumerate(makers):
        name, limit = str(maker.output[0]), str(maker.input[1])
        shape = next(list(tensor.dims) for tensor in graph.initializer if tensor.name == limit)
        middle = _constant(graph, f"{name}.middle", np.full(shape, bits.lowest + bits.step * (step + 0.5)))
        added.append(_again(maker, name, f"{first}.in", [middle, middle, *maker.input[3:]]))
        maker.CopyFrom(onnx.helper.make_node("Greater", [maker.input[0], limit], [f"{name}.above"]))
        added.append(onnx.helper.make_node("Cast", [f"{name}.above"], [f"{name}.one"], to=onnx.TensorProto.FLOAT))
        counted, before = f"{name}.one", counted
        if before:
            added.append(onnx.helper.make_node("Add", [before, counted], [f"{name}.count"]))
            counted = f"{name}.count"
    step_name = _constant(graph, f"{first}.step", np.array(bits.step))
    lowest = _constant(graph, f"{first}.lowest", np.array(bits.lowest))
    added.append(onnx.helper.make_node("Mul", [counted, step_name], [f"{first}.scaled"]))
    added.append(onnx.helper.make_node("Add", [f"{first}.scaled", lowest], [first]))
    return added


def _again(maker: onnx.NodeProto, name: str, source: str, ends: Sequence[str]) -> onnx.NodeProto:
    """The same FakeQuantize with other bounds, from what is fed to who reads."""
    node = onnx.NodeProto()
    node.CopyFrom(maker)
    del node.input[:], node.output[:]
    node.input.extend([source, *ends])
    node.output.append(f"{name}.again")
    return node


def _constant(graph: onnx.GraphProto, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return name
