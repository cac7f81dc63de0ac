"""Plain QDQ for TensorRT, its structural check on graphs that break one rule each, and ONNX's own small types."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from torch import nn

from fewbits.commands import ship
from fewbits.commands.kernels import together
from fewbits.deploy import Exported, export, prove
from fewbits.deploy.placement import misplaced

from .networks import Concat, Plain, Residual, Tokens, images, student

SEVEN = {"residual": 7, "ends": 7}
"""What fits TensorRT's int8."""


def shipped(model: nn.Module, folder: Path, variant: str, **options: Any) -> tuple[Exported, onnx.ModelProto]:
    path = folder / f"{variant}.onnx"
    options = {"normalisation": None, "minimum_equal": 0.0, **options}
    found = export(model, path, example=images(32), variant=variant, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    return found, proto


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize(
    ("model", "weights", "activations", "method"),
    [
        pytest.param(Residual, 2, 2, "lsq", id="2/2"),
        pytest.param(Residual, 8, 7, "lsq", id="8/7"),
        pytest.param(lambda: Plain(Concat(), width=16), 4, 4, "lsq", id="concatenation, pools, biases"),
        pytest.param(Residual, 2, 2, "ewgs", id="shifted inputs"),
        pytest.param(Residual, 3, 3, "dorefa", id="no zero level"),
    ],
)
def test_what_has_seven_bits_is_as_tensorrt_takes_it(model, weights, activations, method, tmp_path: Path):
    quantized = student(model(), weights, activations, method, **SEVEN)
    found, proto = shipped(quantized, tmp_path, "qdq")
    assert min(row.equal for row in found.codes) >= 0.999
    assert found.misplaced == ()
    assert {(row.kernel, row.reason) for row in found.layers} == {("int8 by Q/DQ", "")}
    # The same, looked at by other means: no rule of the check is used here.
    held = constants(proto)
    makers = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert held[node.input[2]].dtype == np.int8
            assert not held[node.input[2]].any()
            assert (held[node.input[1]] > 0).all()
        if node.op_type in ("Conv", "MatMul"):
            assert makers[node.input[0]].op_type == makers[node.input[1]].op_type == "DequantizeLinear"
            assert len(node.input) == 2  # no bias that an engine might round
    for row in found.layers:
        layer = quantized.get_submodule(row.name)
        stored = held[f"{row.name}.weight.codes"]
        scale = next(held[n.input[1]] for n in proto.graph.node if n.input[0] == f"{row.name}.weight.codes")
        values = stored * scale if isinstance(layer, nn.Linear) else stored * scale.reshape(-1, 1, 1, 1)
        with torch.no_grad():
            wanted = layer.weight_quantizer(layer.weight).numpy()
        np.testing.assert_allclose(values.T if isinstance(layer, nn.Linear) else values, wanted, rtol=1e-6, atol=1e-6)
        if method == "lsq":
            codes = layer.weight_quantizer.encode(layer.weight).integers.numpy()
            assert np.array_equal(stored.T if isinstance(layer, nn.Linear) else stored, codes)


def test_eight_bits_are_written_and_named(tmp_path: Path):
    found, _ = shipped(student(Residual(), 4, 4), tmp_path, "qdq")
    assert min(row.equal for row in found.codes) >= 0.999
    quantizers = {row.name for row in found.misplaced}
    streams = {"relu.output_stream", "bn1.output_stream", "relu1.output_stream", "bn2.output_stream"}
    assert quantizers == {"stem.input_quantizer", "head.input_quantizer", "relu2.output_stream", *streams}
    assert all("train it with 7 bits" in row.reason for row in found.misplaced)
    assert [row.kernel for row in found.layers] == ["float", "int8 by Q/DQ", "int8 by Q/DQ", "float"]
    assert "7 bits" in found.layers[0].reason


@pytest.mark.parametrize(("weights", "activations", "method"), [(8, 8, "lsq"), (1, 1, "sign"), (4, 4, "minmax")])
def test_other_grids_run_and_are_equal(weights: int, activations: int, method: str, tmp_path: Path):
    found, _ = shipped(student(Residual(), weights, activations, method), tmp_path, "qdq")
    assert min(row.equal for row in found.codes) >= 0.999
    assert found.misplaced


@pytest.mark.parametrize(
    ("weights", "method", "options", "floats"),
    [
        pytest.param(8, "ewgs", {}, {"conv1", "conv2"}, id="ewgs at 8 bits, whose codes reach 128"),
        pytest.param(8, "lsq", {"keep": ("conv2",)}, set(), id="a layer kept in float"),
        pytest.param(32, "lsq", {}, set(), id="float weights"),
        pytest.param(8, "dorefa", {}, {"conv1", "conv2"}, id="a grid without zero"),
    ],
)
def test_float_weights_stay_floats(weights: int, method: str, options: dict, floats: set, tmp_path: Path):
    """Found: between DequantizeLinear and QuantizeLinear ONNX Runtime quantized them, and 17 to 77 % of codes differed.

    With every optimization that a stock session has.
    """
    model = student(Residual(), weights, 8, method, **options)
    found, _ = shipped(model, tmp_path, "qdq")
    assert min(row.equal for row in found.codes) >= 0.999
    assert {row.name for row in found.layers if row.kernel == "float"} >= floats
    session = onnxruntime.InferenceSession(tmp_path / "qdq.onnx", providers=["CPUExecutionProvider"])
    x = images(32)
    with torch.no_grad():
        wanted = model(x).numpy()
    np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], wanted, atol=0.02 * np.abs(wanted).max())


def test_float_residuals_are_named(tmp_path: Path):
    found, _ = shipped(student(Residual(), 4, 4, residual=None, ends=7), tmp_path, "qdq")
    assert {(row.operator, row.name) for row in found.misplaced} >= {("Add", "behind conv1"), ("Add", "behind conv2")}
    assert any("BatchNormalization behind conv1" in row.reason for row in found.misplaced)


def test_tokens(tmp_path: Path):
    found, _ = shipped(student(Tokens(), 4, 4, residual=None, ends=7), tmp_path, "qdq")
    assert min(row.equal for row in found.codes) >= 0.999
    assert {row.kernel for row in found.layers} == {"int8 by Q/DQ"}
    assert {row.operator for row in found.misplaced} == {"Add"}


# One graph that follows every rule, and what makes it break one.


def good() -> dict[str, Any]:
    """A convolution with batch norm and ReLU, a second one added to the first, an average, a product."""
    numbers: dict[str, Any] = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "ws": np.full(4, 0.1, np.float32),
        "wz": np.zeros(4, np.int8),
        "a.weight.codes": np.ones((4, 4, 1, 1), np.int8),
        "b.weight.codes": np.full((4, 4, 1, 1), 2, np.int8),
        "c.weight.codes": np.full((4, 4), 3, np.int8),
        "shift": np.ones((4, 1, 1), np.float32),
        "shape": np.array([0, -1]),
    }
    for name in ("gamma", "beta", "mean", "variance"):
        numbers[name] = np.ones(4, np.float32)
    nodes = [
        *pair("images", "x"),
        weight("a"),
        (["x", "a"], "Conv", "a.conv", {}),
        (["a.conv", "gamma", "beta", "mean", "variance"], "BatchNormalization", "a.norm", {}),
        (["a.norm"], "Relu", "a.relu", {}),
        *pair("a.relu", "y"),
        weight("b"),
        (["y", "b"], "Conv", "b.conv", {}),
        (["b.conv", "shift"], "Add", "b.sum", {}),
        (["b.sum", "y"], "Add", "sum", {}),
        (["sum"], "Relu", "sum.relu", {}),
        *pair("sum.relu", "p"),
        (["p"], "GlobalAveragePool", "pool", {}),
        *pair("pool", "q"),
        (["q", "shape"], "Reshape", "flat", {}),
        weight("c"),
        (["flat", "c"], "MatMul", "logits", {}),
    ]
    return {"numbers": numbers, "nodes": nodes}


def pair(source: str, result: str, scale: str = "s", zero: str = "z") -> list[tuple]:
    quantized = f"{result}.codes"
    return [
        ([source, scale, zero], "QuantizeLinear", quantized, {}),
        ([quantized, scale, zero], "DequantizeLinear", result, {}),
    ]


def weight(name: str) -> tuple:
    return ([f"{name}.weight.codes", "ws", "wz"], "DequantizeLinear", name, {"axis": 1 if name == "c" else 0})


def looked_at(graph: dict[str, Any]) -> list[tuple[str, str, str]]:
    nodes = [helper.make_node(op, inputs, [output], **attributes) for inputs, op, output, attributes in graph["nodes"]]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in graph["numbers"].items()]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("images", "logits")]
    proto = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors))
    found = misplaced(SimpleNamespace(proto=proto, cuts=()))
    return [(row.operator, row.name, row.reason) for row in found]


def rewired(graph: dict[str, Any], output: str, index: int, source: str) -> None:
    next(inputs for inputs, _, result, _ in graph["nodes"] if result == output)[index] = source


def between(graph: dict[str, Any], output: str, nodes: list[tuple]) -> None:
    place = next(index for index, node in enumerate(graph["nodes"]) if node[2] == output)
    graph["nodes"][place:place] = nodes


def test_the_good_graph_is_good():
    assert looked_at(good()) == []


def zero_point(graph):
    graph["numbers"]["z"] = np.int8(3)


def no_int8(graph):
    graph["numbers"] |= {"uz": np.uint8(0)}
    for node in graph["nodes"]:
        node[0][:] = ["uz" if name == "z" else name for name in node[0]]


def negative_scale(graph):
    graph["numbers"]["ws"] = np.array([0.1, -0.1, 0.1, 0.1], np.float32)


def float_weight(graph):
    graph["numbers"]["a.weight.values"] = np.ones((4, 4, 1, 1), np.float32)
    rewired(graph, "a.conv", 1, "a.weight.values")


def float_input(graph):
    rewired(graph, "b.conv", 0, "a.relu")


def float_residual(graph):
    rewired(graph, "sum", 1, "a.relu")


def read_twice(graph):
    between(graph, "sum", [(["b.sum"], "Sigmoid", "aside", {})])


def float_pool(graph):
    rewired(graph, "pool", 0, "sum.relu")


def float_result(graph):
    rewired(graph, "flat", 0, "pool")


def quantized_too_early(graph):
    between(graph, "a.relu", pair("a.norm", "early"))
    rewired(graph, "a.relu", 0, "early")


def quantized_in_front_of_the_norm(graph):
    between(graph, "a.norm", pair("a.conv", "early"))
    rewired(graph, "a.norm", 0, "early")


def codes_read(graph):
    between(graph, "a", [(["x.codes"], "Identity", "aside", {})])


def many_scales(graph):
    graph["numbers"]["s"] = np.full(4, 0.1, np.float32)


def integer_bias(graph):
    graph["numbers"]["bias"] = np.ones(4, np.int32)
    between(graph, "a.conv", [(["bias", "ws"], "DequantizeLinear", "float bias", {})])
    next(inputs for inputs, _, result, _ in graph["nodes"] if result == "a.conv").append("float bias")


def foreign(graph):
    between(graph, "a.relu", [(["a.norm"], "FakeQuantize", "aside", {"domain": "org.openvinotoolkit"})])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (zero_point, ("QuantizeLinear", "in front of every layer", "zero point is not 0")),
        (no_int8, ("QuantizeLinear", "behind a", "no int8")),
        (negative_scale, ("DequantizeLinear", "a", "positive")),
        (float_weight, ("Conv", "a", "its weight is in float")),
        (float_input, ("Conv", "b", "its input is in float (from Relu behind a)")),
        (float_residual, ("Add", "behind b", "an input is in float (from Relu behind a)")),
        (read_twice, ("Add", "behind b", "an input is in float (from Add behind b)")),
        (float_pool, ("GlobalAveragePool", "behind b", "an input is in float")),
        (float_result, ("MatMul", "c", "its input is in float (from GlobalAveragePool")),
        (quantized_too_early, ("Relu", "behind a", "between a convolution and its Relu")),
        (quantized_in_front_of_the_norm, ("BatchNormalization", "behind a", "its BatchNormalization")),
        (codes_read, ("QuantizeLinear", "in front of every layer", "read by Identity")),
        (many_scales, ("QuantizeLinear", "in front of every layer", "one scale")),
        (integer_bias, ("DequantizeLinear", "in front of every layer", "another type than int8")),
        (foreign, ("FakeQuantize", "behind a", "org.openvinotoolkit")),
    ],
)
def test_a_broken_rule_is_named(change, expected: tuple[str, str, str]):
    graph = good()
    change(graph)
    operator, name, reason = expected
    found = looked_at(graph)
    assert any(row[:2] == (operator, name) and reason in row[2] for row in found), found


def test_an_average_that_ends_in_float_is_named():
    graph = good()
    graph["nodes"] = [*graph["nodes"][:-5], (["pool"], "Softmax", "logits", {})]
    assert [row[:2] for row in looked_at(graph)] == [("GlobalAveragePool", "behind b")]


# ONNX's own types.


@pytest.mark.parametrize(("bits", "method"), [(2, "lsq"), (3, "lsq"), (4, "lsq"), (2, "dorefa"), (4, "minmax")])
def test_small_types_compute_what_packed_bytes_do(bits: int, method: str, tmp_path: Path):
    model = student(Residual(), bits, bits, method)
    found, proto = shipped(model, tmp_path, "int4")
    packed = export(model, tmp_path / "packed.onnx", example=images(32), normalisation=None, minimum_equal=0.0)
    x = images(8).numpy()
    own, theirs = (onnxruntime.InferenceSession(path).run(None, {"images": x})[0] for path in (found.path, packed.path))
    assert np.array_equal(own, theirs)
    assert [row.kernel for row in found.layers] == [row.kernel for row in packed.layers]
    stored = {t.name: t for t in proto.graph.initializer}["conv2.weight.codes"]
    names = {2: ("INT2", "UINT2"), 3: ("INT4", "UINT4"), 4: ("INT4", "UINT4")}[bits]
    assert TensorProto.DataType.Name(stored.data_type) in names
    assert len(stored.raw_data) == model.conv2.weight.numel() * (2 if bits == 2 else 4) // 8
    casts = [node for node in proto.graph.node if "conv2.weight.codes" in node.input]
    assert [node.op_type for node in casts] == ["Cast"]
    assert proto.opset_import[0].version == (25 if bits == 2 else 21)


@pytest.mark.parametrize("variant", ["qdq", "int4"])
def test_a_file_is_proved_as_what_it_is(variant: str, tmp_path: Path):
    model = student(Residual(), 4, 4, **SEVEN)
    found, _ = shipped(model, tmp_path, variant)
    assert found.variant == variant
    assert prove(model, found.path, example=images(16), normalisation=None).engine == "onnxruntime"
    proto = onnx.load(found.path)
    next(entry for entry in proto.metadata_props if entry.key == "variant").value = "other"
    found.path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="variant 'other', which this version does not know"):
        prove(model, found.path, example=images(16), normalisation=None)


def test_variants_belong_to_engines(tmp_path: Path):
    model = student(Residual(), 4, 4)
    with pytest.raises(ValueError, match="one of packed, qdq, int4 for engine 'onnxruntime', got 'int8'"):
        export(model, tmp_path / "a.onnx", example=images(2), normalisation=None, variant="int8")
    with pytest.raises(ValueError, match="one of packed for engine 'openvino', got 'qdq'"):
        export(model, tmp_path / "a.onnx", example=images(2), normalisation=None, engine="openvino", variant="qdq")


def test_the_command_says_what_tensorrt_would_not_take():
    table = Table()
    rows = [{"name": name, "operator": "Add", "reason": "in float"} for name in ("behind a", "behind b")]
    ship._add_placement(table, rows)
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    assert "Add behind a, Add behind b: in float" in text.getvalue()
    assert "2 places break its rules; read from the graph, TensorRT itself was not run" in text.getvalue()
    assert ship.default_name("onnxruntime", None, "qdq") == "student-qdq.onnx"


def test_a_reason_that_many_layers_share_is_said_once():
    rows = [{"name": name, "note": note} for name, note in (("a", "wide"), ("b", ""), ("c", "odd"), ("d", "wide"))]
    assert together(rows, "note") == ["a, d: wide", "c: odd"]
