"""Channels behind inputs that never change: their batch norm scales by hundreds, and one sum has to give its shift."""

import numpy as np
import pytest
import torch
from torch import nn

from fewbits.deploy import graph, onnx, parity
from fewbits.deploy.fold import Care
from fewbits.deploy.integer_bias import OutputGrid, choose

from .networks import Block, Plain, images, student


def code(value: float, lowest: int, highest: int) -> int:
    return min(max(round(value), lowest), highest)


@pytest.mark.parametrize("stride", [1, 16])
@pytest.mark.parametrize(("lowest", "highest"), [(0, 15), (0, 3), (-8, 7), (0, 14)])
def test_a_channel_that_is_clipped_but_at_one_sum(lowest: int, highest: int, stride: int):
    generator = np.random.default_rng(0)
    ratio = generator.uniform(3.0, 5000.0, 300) / stride
    exact = generator.uniform(lowest - 3, highest + 3, 300)  # what the sum ``middle`` gives, in steps
    middle = stride * generator.integers(-30, 30, 300)
    bias = exact / ratio - middle
    largest = np.full(300, 18)
    chosen = choose(bias, largest, OutputGrid(ratio, lowest, highest, stride=stride))
    found_one = 0
    for c in range(300):
        if (
            stride * ratio[c] <= 2 * (highest - lowest)
            or (18 + 1) * abs(code(exact[c], lowest, highest)) < highest - lowest
        ):
            continue  # not clipped, or not enough room
        for total in middle[c] + stride * np.array([-700, -3, -2, -1, 0, 1, 2, 3, 700]):
            wanted = code(ratio[c] * (total + bias[c]), lowest, highest)
            unit = ratio[c] / chosen.factor[c] * chosen.stretch[c]
            assert code(unit * (chosen.factor[c] * total + chosen.bias[c]), lowest, highest) == wanted
        found_one += 1
    assert found_one > 150


@pytest.mark.parametrize("care", [Care.PLAIN, Care.LIFTED])
def test_channels_that_are_always_zero(care: Care):
    body = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False)]
    model = student(Plain(*body, nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1)), 4, 4)
    with torch.no_grad():
        model.body[1].bias[:3] = -100.0
        model.body[4].running_mean[:3] = 0.0
        model.body[4].running_var[:3] = 1e-12
        model.body[4].weight[:3] = torch.tensor([1.0, -1.5, 0.6])
        step = float(model.body[6].input_quantizer.encode(torch.zeros(())).scale)
        model.body[4].bias[:3] = step * torch.tensor([3.3, 12.0, 5.6])
    x = images(16)
    built = onnx.build(graph.trace(model, x, None), model, {}, {"body.3": care})
    rows = parity.compare(built.proto, parity.reference(model, x, None, built.cuts), x, built.cuts).codes
    assert next(row for row in rows if row.name == "body.6.input_quantizer").equal >= 0.999


def test_a_channel_without_a_weight():
    model = student(Plain(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), 4, 8)
    with torch.no_grad():
        model.body[0].weight[:3] = 0.0
        model.body[1].running_mean[:3] = 0.0
        model.body[1].running_var[:3] = 0.0
        model.body[1].weight[:3] = 20.0
        step = float(model.body[2].input_quantizer.encode(torch.zeros(())).scale)
        model.body[1].bias[:3] = step * torch.tensor([1.3, -1.7, 2.4])
    x = images(16)
    built = onnx.build(graph.trace(model, x, None), model, {})
    rows = parity.compare(built.proto, parity.reference(model, x, None, built.cuts), x, built.cuts).codes
    assert next(row for row in rows if row.name == "body.2.input_quantizer").equal >= 0.999


def test_shifted_inputs_make_the_codes_exact():
    model, x = student(Plain(*(Block() for _ in range(6))), 4, 4), images(64)
    traced = graph.trace(model, x, None)
    plain = onnx.build(traced, model, {})
    expected = parity.reference(model, x, None, plain.cuts)
    lifted = onnx.build(traced, model, {}, {site.layer: Care.LIFTED for site in plain.sites})
    before, after = (parity.compare(built.proto, expected, x, built.cuts).codes for built in (plain, lifted))
    assert min(row.equal for row in before) < 0.9995
    assert min(row.equal for row in after) > 0.9999
