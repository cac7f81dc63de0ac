"""When a run saves a checkpoint, and how: all processes together, the first one writes."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator

from ..distill import Networks
from .checkpoint import save_checkpoint
from .ema import MovingAverage
from .folder import RunFolder
from .position import Position
from .resume import take_checkpoint


class Saver:
    """A run's checkpoints, and the clock of its sitting.

    Args:
        folder: where they go; None keeps nothing.
        accelerator: the processes.
        most_seconds: between two of them.
    """

    def __init__(self, folder: RunFolder | None, accelerator: Accelerator, most_seconds: float) -> None:
        self._folder, self._accelerator, self._most_seconds = folder, accelerator, most_seconds

    def start(self) -> None:
        """The first step comes now."""
        self._counted = self._saved = time.monotonic()

    def is_due(self) -> bool:
        """By the clock of the first process: all save together, or wait for one another for ever."""
        due = float(time.monotonic() - self._saved >= self._most_seconds)
        if self._accelerator.num_processes == 1:
            return bool(due)
        flag = torch.tensor(due, device=self._accelerator.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag)

    def save(
        self, position: Position, networks: Networks, optimizer: torch.optim.Optimizer, ema: MovingAverage | None
    ) -> None:
        """Replace the run's checkpoint."""
        self._saved = time.monotonic()
        if self._folder is None:
            return
        if self._accelerator.is_main_process:
            self.count(position)
        checkpoint = take_checkpoint(position, networks, optimizer, ema)
        if self._accelerator.is_main_process:
            save_checkpoint(self._folder.checkpoint, checkpoint)
        self._accelerator.wait_for_everyone()

    def count(self, position: Position) -> None:
        """Add the seconds since the last time to the run's."""
        now = time.monotonic()
        position.seconds += now - self._counted
        self._counted = now
