"""What a person sees while a run goes on: a bar that says what is left, and a line for each evaluation."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A progress bar over all steps of a run; silent where ``shown`` is False.

    Args:
        title: of the run.
        num_steps: optimizer steps of all phases.
        done: steps that a resumed run has behind it.
        shown: False in all processes but the first, and on request.
    """

    def __init__(self, title: str, num_steps: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not shown or not self.console.is_terminal,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=num_steps, completed=done, status="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, phase: str, loss: float, images_per_second: float) -> None:
        """One optimizer step is over."""
        status = f"{phase}  loss {loss:.3f}  {images_per_second:,.0f} images/s"
        self._progress.update(self._task, advance=1, status=status)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._progress.console.print(f"{self._title}: {line}", highlight=False)
