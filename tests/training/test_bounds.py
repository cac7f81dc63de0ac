"""Learned steps change by a tenth at most in one optimizer step, in any loop."""

from typing import Any

import pytest
import torch
from torch import nn
from training_worker import network, part_of_digits

from fewbits.convert import quantize
from fewbits.quantizers import Quantizer
from fewbits.recipes import make
from fewbits.training import bound_steps


def small_student(quantizer: str = "lsq") -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return quantize(net, 4, 4, quantizer=quantizer)


def steady(student: nn.Module) -> list[nn.Parameter]:
    return [q.get_parameter(name) for q in student.modules() if isinstance(q, Quantizer) for name in q.steady]


class Jump(torch.optim.Optimizer):
    """Puts each parameter where it is told, and bounds nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.targets: dict[int, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if id(p) in self.targets:
                p.fill_(self.targets[id(p)])


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
def test_steps_change_by_a_tenth_at_most_and_never_collapse(quantizer: str):
    student = small_student(quantizer)
    optimizer = Jump(student.parameters())
    bound_steps(optimizer, student)
    steps = steady(student)
    assert len(steps) >= 4
    for _ in range(2):  # the second time from where the first one ended
        before = [float(p.detach()) for p in steps]
        wanted = [value * (-5.0, 1.05, 7.0, 0.0)[number % 4] for number, value in enumerate(before)]
        optimizer.targets = {id(p): value for p, value in zip(steps, wanted, strict=True)}
        optimizer.step()
        for p, value, target in zip(steps, before, wanted, strict=True):
            assert float(p.detach()) == pytest.approx(min(max(target, 0.9 * value), 1.1 * value))


def test_weights_and_foreign_steps_are_left_alone():
    student = small_student()
    *foreign, own = steady(student)
    optimizer = Jump([own, student[0].weight])
    bound_steps(optimizer, student)
    optimizer.targets = {id(own): 1e6, id(student[0].weight): 1e6}
    with torch.no_grad():
        foreign[0].fill_(3.0)  # somebody else's business
    limit = 1.1 * float(own.detach())
    optimizer.step()
    assert float(own.detach()) == pytest.approx(limit)
    assert float(foreign[0].detach()) == 3.0
    assert bool((student[0].weight == 1e6).all())


def test_a_float_network_needs_no_bounds():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bound_steps(optimizer, net)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_a_rate_that_ruins_steps_does_not_in_a_loop_of_ones_own():
    """Without the bounds one update throws steps by orders of magnitude, for good."""
    data = part_of_digits()
    images, labels = next(data.train.batches(batch_size=16, normalisation=data.normalisation))
    moved = {}
    for bounded in (False, True):
        student = quantize(network(0), weights=8, activations=8)
        objective = make("plain").objective(student, batches=[images])
        optimizer = torch.optim.SGD(objective.param_groups(lr=10.0), momentum=0.9)
        if bounded:
            bound_steps(optimizer, objective)
        before = [float(p.detach()) for p in steady(student)]
        objective(images, labels).total.backward()
        optimizer.step()
        after = [float(p.detach()) for p in steady(student)]
        moved[bounded] = max(abs(b - a) / a for a, b in zip(before, after, strict=True))
    assert moved[False] > 1
    assert moved[True] <= 0.1 + 1e-6
