"""``--profile``: where the time of a training step goes."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity

TRACE, TABLE = "profile.json.gz", "profile.txt"
STEPS_BEFORE, STEPS_SEEN = 3, 3
"""Steps of a sitting that pass before a profile begins (compiling is not training), and those that it is made of."""
ROWS = 10


class Profile:
    """PyTorch's profiler over a few early steps: a trace for chrome://tracing, and the ten most expensive operators.

    An evaluation between these steps is in it, too: so where a phase or an epoch is shorter than they are.

    Args:
        folder: where ``profile.json.gz`` and ``profile.txt`` go; None does nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._profiler: Any = None

    def __enter__(self) -> Self:
        if self._folder is not None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            plan = torch.profiler.schedule(wait=STEPS_BEFORE - 1, warmup=1, active=STEPS_SEEN, repeat=1)
            self._profiler = torch.profiler.profile(
                activities=activities, schedule=plan, on_trace_ready=self._write, profile_memory=True
            )
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, trace)

    def step(self) -> None:
        """A step is over."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: Any) -> None:
        assert self._folder is not None
        profiler.export_chrome_trace(str(self._folder / TRACE))
        on = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=on, row_limit=ROWS, max_name_column_width=60)
        (self._folder / TABLE).write_text(f"{STEPS_SEEN} steps, and an evaluation that lies between them\n{table}\n")
