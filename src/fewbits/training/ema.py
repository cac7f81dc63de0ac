"""An exponential moving average of a network's parameters: weights and quantizer steps alike."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """averaged := decay * averaged + (1 - decay) * parameter, after every optimizer step.

    Args:
        model: the network that is trained; not changed.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the parameters of ``model``."""
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.averages.values()), [parameters[n].detach() for n in self.averages], 1 - self.decay
        )

    @torch.no_grad()
    def network(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` with the averaged parameters; its batch norm still has to be re-estimated."""
        averaged = copy.deepcopy(model)
        for name, parameter in averaged.named_parameters():
            parameter.copy_(self.averages[name])
        return averaged
