"""Steps that went wrong: skipped, counted, undone, and the end of the run when they persist."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def has_diverged(first_loss: float | None, last_loss: float | None, accuracy: float, num_classes: int) -> bool:
    """Whether a run whose loss stayed finite was lost all the same.

    Its last loss is twice what guessing costs, and twice what it began with, and the network guesses: at most a tenth
    of the way from chance to perfect. Both count, for a term whose weight grows makes the loss grow too.

    Args:
        first_loss, last_loss: of the student's steps, in nats; None where none was taken.
        accuracy: at the end, 0 to 1.
        num_classes: 2 or more.

    >>> has_diverged(2.3, 1e6, 0.1, 10), has_diverged(2.3, 1e6, 0.9, 10), has_diverged(2.3, 2.4, 0.1, 10)
    (True, False, False)
    """
    if first_loss is None or last_loss is None:
        return False
    chance = 1 / num_classes
    return last_loss > 2 * max(first_loss, math.log(num_classes)) and accuracy < chance + 0.1 * (1 - chance)


class StepGuard:
    """Keeps a non-finite step from leaving traces.

    A NaN in a batch reaches the running averages of batch norm in the forward pass, before any loss is looked at: they
    are remembered before each step and put back.

    Args:
        networks: whose buffers are watched.
        max_bad_steps: bad steps in a row that end the run.
        in_a_row, skipped: bad steps just now and in all, of the sitting before.
    """

    def __init__(self, networks: nn.Module, max_bad_steps: int, in_a_row: int = 0, skipped: int = 0) -> None:
        # Batch norm's counters too: with momentum None they weigh the next average.
        buffers = list(networks.buffers())
        self._buffers = buffers
        self._kept = [b.detach().clone() for b in buffers]
        self._max = max_bad_steps
        self.in_a_row = in_a_row
        self.skipped = skipped

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
