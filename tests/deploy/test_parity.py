"""The yardstick itself: what counts as one step."""

import pytest
from torch import nn

from fewbits.deploy import graph, onnx, parity

from .networks import Plain, images, student


@pytest.mark.parametrize(("method", "bits"), [("sign", 1), ("lsq", 1), ("lsq", 4)])
def test_neighbouring_codes_are_one_step_apart(method: str, bits: int):
    network = Plain(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU())  # no ReLU in front of it: both signs occur
    model, x = student(network, bits, bits, method), images(4)
    built = onnx.build(graph.trace(model, x, None), model, {})
    expected = parity.reference(model, x, None, built.cuts)
    cut = next(c for c in built.cuts if c.quantizer == "body.1.input_quantizer")
    codes = expected.codes[cut.quantizer, 0]
    lowest, next_one = sorted({int(c) for c in codes.reshape(-1)})[:2]
    place = (codes == lowest).nonzero()
    codes[tuple(index[0] for index in place)] = next_one
    row = next(r for r in parity.compare(built.proto, expected, x, built.cuts).codes if r.name == cut.quantizer)
    assert row.largest == 1.0
    assert row.equal == pytest.approx(1 - 1 / codes.size)
