"""Steps that went wrong: skipped, counted, undone, and the end of the run when they persist."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer

LARGEST_CHANGE = 0.1


class StepBounds:
    """Lets learned steps change by a tenth of themselves in one optimizer step (ours, no paper has it).

    An 8-bit step is some thousandths: one update at a high rate overshoots it, the layer's input saturates, and with
    the step at its floor no gradient brings it back; the run would end as a constant classifier without a word.

    Args:
        networks: whose quantizers are watched.
    """

    def __init__(self, networks: nn.Module) -> None:
        quantizers = [module for module in networks.modules() if isinstance(module, Quantizer)]
        self._steps: list[Tensor] = [
            p for q in quantizers for name in q.steady for p in [q.get_parameter(name)] if p.requires_grad
        ]
        self._kept = [p.detach().clone() for p in self._steps]

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step."""
        if self._steps:
            torch._foreach_copy_(self._kept, self._steps)

    @torch.no_grad()
    def apply(self) -> None:
        """After a step: bring back what went too far."""
        if self._steps:
            torch._foreach_maximum_(self._steps, list(torch._foreach_mul(self._kept, 1 - LARGEST_CHANGE)))
            torch._foreach_minimum_(self._steps, list(torch._foreach_mul(self._kept, 1 + LARGEST_CHANGE)))


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class StepGuard:
    """Keeps a non-finite step from leaving traces.

    A NaN in a batch reaches the running averages of batch norm in the forward pass, before any loss is looked at: they
    are remembered before each step and put back.

    Args:
        networks: whose buffers are watched.
        max_bad_steps: bad steps in a row that end the run.
    """

    def __init__(self, networks: nn.Module, max_bad_steps: int) -> None:
        # Batch norm's counters too: with momentum None they weigh the next average.
        buffers = list(networks.buffers())
        self._buffers = buffers
        self._kept = [b.detach().clone() for b in buffers]
        self._max = max_bad_steps
        self.in_a_row = 0
        self.skipped = 0

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def accept(self, loss: Tensor, grad_norm: Tensor, where: str) -> bool:
        """Whether the step may be taken; a bad one is undone.

        Args:
            loss: of the step, over all processes.
            grad_norm: of all trained parameters.
            where: epoch and step, for messages.

        Raises:
            TrainingError: too many bad steps in a row.
        """
        if bool(torch.isfinite(loss.detach().float()) & torch.isfinite(grad_norm.detach().float())):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.skipped += 1
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._buffers, self._kept)
        if self.in_a_row >= self._max:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a non-finite loss ({float(loss):.4g}) or gradient "
                f"({float(grad_norm):.4g}), the last at {where}; look for NaN in the data, or lower --lr"
            )
        return False
