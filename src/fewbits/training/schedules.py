"""The learning rate as a pure function of where a phase stands: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from .settings import Settings


def lr_factor(step: int, num_steps: int, settings: Settings) -> float:
    """Factor on the peak learning rate for step ``step`` (from 0) of a phase of ``num_steps``.

    >>> [round(lr_factor(step, 4, Settings(warmup_steps=0)), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    warmup = min(settings.warmup_steps, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "step":
        return float(0.1 ** sum(step >= milestone * num_steps for milestone in settings.milestones))
    return 1.0


def phase_steps(shares: tuple[float, ...], num_steps: int) -> tuple[int, ...]:
    """How many of ``num_steps`` steps each phase gets; they add up, and each has at least one.

    Raises:
        ValueError: there are fewer steps than phases.

    >>> phase_steps((0.2, 0.8), 11)
    (2, 9)
    """
    ends = [round(sum(shares[: i + 1]) / sum(shares) * num_steps) for i in range(len(shares))]
    steps = tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))
    if min(steps) < 1:
        raise ValueError(
            f"{num_steps} steps are too few for phases with shares {shares}; train longer or with smaller batches"
        )
    return steps


def spread_steps(num: int, num_steps: int) -> set[int]:
    """``num`` of ``num_steps`` steps (from 0), spread evenly from the first to the last; one alone is the last.

    >>> sorted(spread_steps(3, 11)), spread_steps(1, 11), spread_steps(0, 11)
    ([0, 5, 10], {10}, set())
    """
    return {round((index / (num - 1) if num > 1 else 1) * (num_steps - 1)) for index in range(num)}
