"""Learned steps that cannot collapse: a hook on any optimizer, in our loop and in a user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer

LARGEST_CHANGE = 0.1


def bound_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let one ``optimizer.step()`` change a learned quantizer step by at most a tenth of itself.

    Forward:  step := min(max(updated, 0.9 * before), 1.1 * before)

    Ours, no paper has it. An 8-bit step is some thousandths: one update at a high rate overshoots it, the layer's input
    saturates, and with the step at its floor no gradient brings it back; the run would end as a constant classifier
    without a word. ``fit`` does it by itself; in a loop of your own it is one line behind the optimizer's.

    Args:
        optimizer: gets two hooks; only steps that it trains are bounded.
        model: the objective, or the quantized network itself.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> from fewbits.convert import quantize
    >>> student = quantize(net, weights=2, activations=2)
    >>> optimizer = torch.optim.SGD(student.parameters(), lr=1e9)
    >>> bound_steps(optimizer, student)
    >>> step = student[0].weight_quantizer.step
    >>> before, step.grad = float(step.detach()), torch.ones_like(step)
    >>> _ = optimizer.step()
    >>> round(float(step.detach()) / before, 3)
    0.9
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [q.get_parameter(name) for q in model.modules() if isinstance(q, Quantizer) for name in q.steady]
    steps: list[Tensor] = [p for p in found if id(p) in trained]
    if not steps:
        return
    limits: list[list[Tensor]] = []

    @torch.no_grad()
    def before(*_: Any) -> None:
        limits[:] = (list(torch._foreach_mul(steps, factor)) for factor in (1 - LARGEST_CHANGE, 1 + LARGEST_CHANGE))

    @torch.no_grad()
    def after(*_: Any) -> None:
        lowest, highest = limits
        torch._foreach_maximum_(steps, lowest)
        torch._foreach_minimum_(steps, highest)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
