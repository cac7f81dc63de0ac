"""What a run says of itself on the way: a line of ``metrics.jsonl``, and TensorBoard's events beside it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from .folder import RunFolder
from .position import Position


class Records:
    """The writer of both; a context, which closes TensorBoard's file.

    Args:
        folder: of the run; None writes nothing: no folder was asked for, or another process writes.
        position: of the run, as it moves.
        steps_per_epoch: tells the epoch of a step.
        tensorboard: whether to write events too.
    """

    def __init__(self, folder: RunFolder | None, position: Position, steps_per_epoch: int, tensorboard: bool) -> None:
        self._folder, self._position, self._steps_per_epoch = folder, position, steps_per_epoch
        self._has_events = tensorboard and folder is not None
        self._events: Any = None

    def __enter__(self) -> Self:
        if self._has_events and self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            # What a resumed run does again is purged: later events of the sitting before.
            self._events = SummaryWriter(
                str(self._folder.path / "tensorboard"), purge_step=self._position.total_step + 1
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, event: str, phase: str, **values: Any) -> None:
        """Record ``values`` of this step."""
        if self._folder is None:
            return
        step = self._position.total_step
        self._folder.record(
            {"event": event, "phase": phase, "step": step, "epoch": step / self._steps_per_epoch, **values}
        )
        if self._events is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._events.add_scalar(f"{phase}/{name}", value, step)
