"""How fast a run goes: images a second, the share of the time that it waits for data, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch


class Pace:
    """A clock for steps that stands still during evaluations and checkpoints.

    Args:
        batch_size: images of a step, over all processes.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps = 0
        self._seconds = self._waited = 0.0
        self._started = time.perf_counter()

    def take(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time that it takes to come is waiting."""
        asked = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        return batch

    def step(self) -> float:
        """A step is over. Returns its images a second."""
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self._steps += 1
        self.resume()
        return self._batch_size / max(seconds, 1e-9)

    def resume(self) -> None:
        """Whatever else was done since the last step does not count."""
        self._started = time.perf_counter()

    def report(self) -> dict[str, float]:
        """Means since the last report: images a second, share of waiting (0 to 1); and the peak memory in bytes.

        Memory is the process's, or, on a GPU, what was allocated there.
        """
        on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
        peak = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()
        seconds = max(self._seconds, 1e-9)
        found = {
            "pace/images_per_second": self._steps * self._batch_size / seconds,
            "pace/waiting": self._waited / seconds,
            "pace/peak_memory": float(peak),
        }
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return found


def _resident_peak() -> int:
    """Bytes; Linux counts in units of 1,024."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
