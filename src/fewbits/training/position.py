"""Where a run stands: saved with every checkpoint, and held against the run when it is read."""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoint import Checkpoint


@dataclass
class Position:
    """Everything that the loop counts.

    Args:
        phase: index of the phase.
        step: optimizer steps of the phase that are over.
        total_step: of the run.
        seconds: of training, over all sittings.
        best_accuracy: of all evaluations of the student, 0 to 1.
        bad_in_a_row: skipped steps just now.
        skipped: skipped steps in all.
        first_loss, last_loss: of the phase's steps so far, to tell whether it diverged; None before one was taken.
    """

    phase: int = 0
    step: int = 0
    total_step: int = 0
    seconds: float = 0.0
    best_accuracy: float = 0.0
    bad_in_a_row: int = 0
    skipped: int = 0
    first_loss: float | None = None
    last_loss: float | None = None

    def saw(self, loss: float) -> None:
        """A step with this loss was taken."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss


def read_position(checkpoint: Checkpoint, phase_steps: tuple[int, ...]) -> Position:
    """The position that a checkpoint holds.

    Raises:
        ValueError: it is none, or none of a run with ``phase_steps``.
    """
    values = checkpoint.values.get("position")
    try:
        position = Position(**checkpoint.values["position"])
        fits = (
            isinstance(checkpoint.values["optimizer"], dict)
            and position.phase in range(len(phase_steps))
            and position.step in range(phase_steps[position.phase] + 1)
            and position.total_step == sum(phase_steps[: position.phase]) + position.step
        )
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            f"the checkpoint's position {values!r} is none of this run, whose phases have {phase_steps} steps; "
            "delete the checkpoint to start afresh"
        )
    return position
