"""Planes of XNOR convolutions are exact: explicit loops over the trained codes, ties and edges included."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fewbits.deploy import planes
from fewbits.deploy.builder import Builder
from fewbits.deploy.compact import compact
from fewbits.deploy.weights import WeightGrid
from fewbits.quantizers import Quantizer, QuantSpec, build

pytest.importorskip("openvino")

from fewbits.deploy.openvino_runtime import Compiled, convert


def quantizer(name: str, low: float = 0.0) -> Quantizer:
    """Two bits, one where the name ends in -1, calibrated on values from ``low`` up."""
    method, bits = name.removesuffix("-1"), 1 if name.endswith("-1") else 2
    made = build(QuantSpec(method, bits, "activation"), 8, 1)
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * (1 - low) + low
    made.calibrate(x)
    return made.eval()


QUANTIZERS = [("lsq", 0.0), ("lsq", -1.0), ("ewgs", -1.0), ("ewgs", 0.0), ("pact", 0.0), ("dorefa", 0.0)]
QUANTIZERS += [("minmax-frozen", 0.0), ("minmax-frozen", -0.5), ("lsq-1", 0.0), ("dorefa-1", 0.0)]


@pytest.mark.parametrize(("method", "low"), QUANTIZERS)
def test_thresholds_turn_where_the_quantizer_does(method: str, low: float):
    made = quantizer(method, low)
    assert planes.serves(made)
    found = planes.thresholds(made).astype(np.float32)
    zero = made.encode(torch.zeros(()))
    assert len(found) == zero.high - zero.low
    above = np.nextafter(found, np.float32(np.inf))
    for code, below, reached in zip(range(zero.low + 1, zero.high + 1), found, above, strict=True):
        assert int(made.encode(torch.tensor(below)).integers) == code - 1
        assert int(made.encode(torch.tensor(reached)).integers) == code


def test_ties_round_to_even_as_in_training():
    made = quantizer("lsq")
    with torch.no_grad():
        made.step.fill_(1.0)
    # round(0.5) is 0, round(1.5) and round(2.5) are 2.
    expected = [0.5, np.nextafter(np.float32(1.5), np.float32(0)), 2.5]
    np.testing.assert_array_equal(planes.thresholds(made).astype(np.float32), np.array(expected, np.float32))


def test_other_grids_are_no_planes():
    for method, bits in (("lsq", 3), ("minmax", 2), ("sign", 1), ("react", 1)):
        assert not planes.serves(build(QuantSpec(method, bits, "activation"), 8, 1))


def looped(codes: np.ndarray, signs: np.ndarray, stride: tuple[int, int], pads: tuple[int, int]) -> np.ndarray:
    """The convolution of codes, the code 0 around them, by explicit loops."""
    num, _, height, width = codes.shape
    outputs, _, rows, columns = signs.shape
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), pads, (rows, columns), stride, strict=True)]
    result = np.zeros((num, outputs, *size), np.int64)
    for n, o, y, x in np.ndindex(result.shape):
        for r, c in np.ndindex(rows, columns):
            at_y, at_x = y * stride[0] + r - pads[0], x * stride[1] + c - pads[1]
            if 0 <= at_y < height and 0 <= at_x < width:
                result[n, o, y, x] += (codes[n, :, at_y, at_x] * signs[o, :, r, c]).sum()
    return result


SHAPES = [
    # channels, outputs, size, kernel, strides, pads
    (8, 3, (5, 7), (3, 3), (1, 1), (1, 1)),
    (24, 8, (6, 4), (3, 3), (2, 2), (1, 1)),
    (16, 5, (4, 4), (1, 1), (2, 1), (0, 0)),
    (8, 4, (7, 5), (3, 1), (1, 2), (0, 1)),
    (40, 9, (5, 6), (5, 3), (1, 1), (2, 2)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "low"), [("lsq", 0.0), ("lsq", -1.0), ("ewgs", -1.0), ("lsq-1", 0.0)])
def test_planes_are_exact(method: str, low: float, shape: tuple):
    channels, outputs, size, kernel, strides, pads = shape
    made, rng = quantizer(method, low), np.random.default_rng(0)
    images = rng.normal(size=(2, channels, *size)).astype(np.float32)
    edges = planes.thresholds(made).astype(np.float32)
    images[0] = rng.choice([*edges, *np.nextafter(edges, np.float32(np.inf)), 0.0], size=images[0].shape)
    bits = rng.integers(0, 2, (outputs, channels, *kernel))
    x = ir.Value(name="images", shape=ir.Shape([2, channels, *size]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21})
    builder = Builder(graph)
    conv = ir.node("Conv", [x], {"strides": strides, "pads": [*pads, *pads]})
    grid = WeightGrid(bits, 1, 2, -1, np.ones(1), None, "layer.weight")
    result, products, unit = planes.convolution(builder, planes.bits(builder, x, made), conv, grid)
    result.name = "logits"
    result.type = x.type
    graph.outputs.append(result)
    session = Compiled(convert(compact(ir.Model(graph, ir_version=10), {})))
    found = session.run({"images": images})["logits"]
    codes = made.encode(torch.from_numpy(images)).integers.numpy().astype(np.int64)
    np.testing.assert_array_equal(found, 2 * looped(codes, 2 * bits - 1, strides, pads))
    assert unit == float(made.encode(torch.zeros(())).scale) / 2
    assert len(products) == made.num_steps
    kinds = list(session.network((2,)).get_runtime_model().get_ops())
    binary = [op for op in kinds if op.get_rt_info()["layerType"].astype(str) == "BinaryConvolution"]
    assert len(binary) == made.num_steps
