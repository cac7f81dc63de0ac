"""Gates and bit widths: what opens and closes what, and that nothing is lost by it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.calibration import calibrate
from fewbits.convert import Rule, quantize, quantizers_of
from fewbits.precision import Fixed, Precision, is_fully_quantized, set_bits, set_precision


def student(**options: Any) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 4)
    )
    quantized = quantize(model, 4, 4, **options).eval()
    calibrate(quantized, [torch.randn(4, 3, 6, 6)])
    return quantized


def bits(model: nn.Module) -> dict[str, int]:
    return {name: quantizer.bits for name, quantizer in quantizers_of(model)}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("activations", [True, False])
def test_gates_by_role(weights: bool, activations: bool):
    model = student()
    set_precision(model, Precision(weights, activations))
    for _, quantizer in quantizers_of(model):
        assert bool(quantizer.enabled) == (weights if quantizer.spec.role == "weight" else activations)
    assert is_fully_quantized(model) == (weights and activations)


def test_closing_and_opening_loses_nothing():
    model, x = student(), torch.randn(2, 3, 6, 6)
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    gates = [quantizer.enabled for _, quantizer in quantizers_of(model)]
    set_precision(model, Precision(False, False))
    assert not torch.equal(model(x), wanted)
    set_precision(model, Precision())
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(gate is q.enabled for gate, (_, q) in zip(gates, quantizers_of(model), strict=True))  # written in place


def test_bits_change_where_the_plan_does_not_fix_them():
    model = student(rules=[Rule("4", weights=3, activations=3)])
    ends_and_rule = {name: number for name, number in bits(model).items() if not name.startswith("2.")}
    assert set_bits(model, weights=2) == 1
    assert set_bits(model, weights=2, activations=3) == 1
    assert bits(model) == ends_and_rule | {"2.weight_quantizer": 2, "2.input_quantizer": 3}
    assert set_bits(model) == 0


def test_only_what_changed_is_calibrated_anew():
    model, x = student(), torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    changed = set_bits(model, weights=2, activations=2)
    assert changed == 4
    assert calibrate(model, [x]) == 4
    assert all(bool(q.calibrated) for _, q in quantizers_of(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.endswith("step") or not key.startswith(("2.", "4."))), key


def test_streams_keep_their_bits():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            return self.three((x + self.two(x)).mean((2, 3)))

    with pytest.warns(UserWarning, match="reached by no module"):
        model = quantize(Residual(), 4, 4)
    set_bits(model, weights=2, activations=2)
    assert {number for name, number in bits(model).items() if "stream" in name} == {8}


@pytest.mark.parametrize("number", [0, 9])
def test_bits_out_of_range(number: int):
    with pytest.raises(ValueError, match=f"bits must be between 1 and 8, got {number}"):
        set_bits(student(), weights=number)


def test_schedules_are_values():
    assert Fixed() == Fixed(Precision(True, True))
    assert Fixed(Precision(weights=False)) != Fixed()
    assert Fixed(Precision(weights=False)).at(0.5) == Precision(weights=False)
