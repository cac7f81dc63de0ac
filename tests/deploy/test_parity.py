"""The yardstick itself: what counts as one step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits.deploy import export, graph, onnx, parity

from .networks import Block, Plain, images, student


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


def test_layers_that_agree_get_more_care_where_predictions_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, x = student(Plain(*(Block() for _ in range(6))), 4, 4), images(256)
    compare, seen = parity.compare, []

    def differs_at_first(*arguments: Any) -> parity.Parity:
        found = compare(*arguments)
        seen.append(found)
        return found if len(seen) > 1 else replace(found, equal_predictions=0.9, mean_difference=1.0)

    monkeypatch.setattr(parity, "compare", differs_at_first)
    found = export(model, tmp_path / "student.onnx", example=x, normalisation=None)
    assert not parity.wrong_rows(seen[0])
    assert min(row.equal for row in seen[0].codes) < 1
    assert min(row.equal for row in found.codes) > min(row.equal for row in seen[0].codes)
    assert all(row.reason == "" for row in found.layers)  # none had to leave the integer kernels


def test_a_tie_may_go_either_way_and_nothing_else_may(monkeypatch: pytest.MonkeyPatch):
    # Pixels k / 255 on a grid of 2 / 255: every odd one lies between two codes.
    torch.manual_seed(0)
    model = fb.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 5)), 8, 8)
    x = torch.randint(0, 256, (16, 3, 6, 6)) / 255
    fb.calibrate(model, [x])
    with torch.no_grad():
        model[0].input_quantizer.step.fill_(2 / 255)
    built = onnx.build(graph.trace(model.eval(), x, None), model, {})
    expected = parity.reference(model, x, None, built.cuts)
    key = (built.cuts[0].quantizer, 0)
    odd = (x * 255).round().int().numpy() % 2 == 1
    assert (expected.ties[key] == odd).all()
    monkeypatch.setitem(expected.codes, key, expected.codes[key] + odd.astype("uint8"))
    assert next(iter(parity.compare(built.proto, expected, x, built.cuts).codes)).equal == 1
    monkeypatch.setitem(expected.codes, key, expected.codes[key] + (~odd).astype("uint8"))
    assert next(iter(parity.compare(built.proto, expected, x, built.cuts).codes)).equal < 0.6
