"""The moving average, against slow recomputation; quantizer steps are averaged like weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_worker import network, train

from fewbits.convert import quantize
from fewbits.training import loop as loop_module
from fewbits.training.ema import MovingAverage


def test_equals_a_slow_average():
    model = quantize(network(), weights=3, activations=3)
    average = MovingAverage(model, 0.8)
    slow = {name: p.detach().double() for name, p in model.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        average.update(model)
        slow = {name: 0.8 * slow[name] + 0.2 * p.detach().double() for name, p in model.named_parameters()}
    for name, value in average.network(model).named_parameters():
        torch.testing.assert_close(value.detach().double(), slow[name], rtol=1e-5, atol=1e-6)
    assert any("step" in name for name in slow)


def test_the_model_itself_is_left_alone():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.fc.bias.add_(1.0)
    average.update(model)
    averaged = average.network(model)
    assert torch.allclose(averaged.get_parameter("fc.bias"), before["fc.bias"] + 0.5)
    assert torch.equal(model.fc.bias, before["fc.bias"] + 1.0)
    assert torch.equal(average.averages["conv1.weight"], before["conv1.weight"])


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    averaged = MovingAverage(model, 0.5).network(model)
    assert averaged[1].weight is averaged[0].weight


def test_a_run_averages_the_students_phase_step_by_step(monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, Tensor]] = []
    phases: list[int] = []
    original = loop_module.Loop._after_step

    def after_step(loop: Any, objective: Any, *args: Any) -> None:
        seen.append({n: p.detach().clone() for n, p in objective.networks.student.named_parameters()})
        phases.append(loop.position.phase)
        original(loop, objective, *args)

    monkeypatch.setattr(loop_module.Loop, "_after_step", after_step)
    result = train("qfd", ema=0.7)
    first = phases.index(1)
    slow = seen[first - 1]  # the student as it stood while the teacher was trained
    for state in seen[first:]:
        slow = {name: 0.7 * slow[name] + 0.3 * state[name] for name in slow}
    assert result.ema is not None
    assert result.ema is not result.student
    for name, value in result.ema.named_parameters():
        torch.testing.assert_close(value.detach(), slow[name], rtol=1e-4, atol=1e-6)
