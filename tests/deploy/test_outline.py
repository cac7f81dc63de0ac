"""What layers repeat stands in the file once, and changes nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import fewbits as fb
from fewbits.deploy import export
from fewbits.deploy.outline import outline
from fewbits.deploy.sessions import kernels, open_session

from .networks import live


def model(chains: int) -> onnx.ModelProto:
    """y = x * sum over chains of ((a + b) * a), each chain on constants of its own."""
    helper = onnx.helper
    nodes, stored, total = [], [], "x"
    for index in range(chains):
        a, b, added, product, cast = (f"{name}{index}" for name in ("a", "b", "added", "product", "cast"))
        stored += [onnx.numpy_helper.from_array(np.float32([index + 1, 2 + index]), name) for name in (a, b)]
        nodes += [
            helper.make_node("Add", [a, b], [added]),
            helper.make_node("Mul", [added, a], [product]),
            helper.make_node("Neg", [product], [cast]),
            helper.make_node("Mul", [total, cast], [f"t{index}"]),
        ]
        total = f"t{index}"
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", total)]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("chains", [1, 2, 5])
def test_repeated_operators_become_one_function(chains: int):
    before, after = model(chains), model(chains)
    outline(after)
    onnx.checker.check_model(after, full_check=True)
    assert len(after.functions) == (1 if chains > 1 else 0)
    assert len(after.graph.node) == (2 * chains if chains > 1 else 4)
    x = np.float32([3, -5])
    wanted, got = (open_session(m.SerializeToString()).run(None, {"x": x})[0] for m in (before, after))
    np.testing.assert_array_equal(got, wanted)
    assert {o for node in after.graph.node for o in node.output} <= {o for n in before.graph.node for o in n.output}


def test_what_others_read_stays_where_it_is():
    made = model(2)
    made.graph.node.append(onnx.helper.make_node("Mul", ["t1", "added0"], ["z"]))
    made.graph.output[0].name = "z"
    before = onnx.ModelProto()
    before.CopyFrom(made)
    outline(made)
    x = np.float32([3, -5])
    wanted, got = (open_session(m.SerializeToString()).run(None, {"x": x})[0] for m in (before, made))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("bits", [2, 8])
def test_size_of_a_deep_network(bits: int, tmp_path: Path):
    """At most 5 % more than its bits, and 500 bytes for each layer: small layers are where a graph weighs."""
    x = torch.rand(8, 3, 32, 32)
    net = fb.quantize(live(fb.models.build("resnet20", num_classes=10), [x]), bits, bits)
    fb.calibrate(net, [x])
    found = export(net.eval(), tmp_path / "student.onnx", example=x, normalisation=None, minimum_equal=0.0)
    assert found.size_bytes <= 1.05 * found.theoretical_bytes + 500 * len(found.layers)
    if bits == 2:  # at 8 bits a random layer may be too coarse for an integer bias
        assert kernels(found.path.read_bytes())[1]["QLinearConv"] == 19
