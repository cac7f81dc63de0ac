"""Recipes side by side over seeds: one row for each, as numbers and as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ..recipes.cost import Cost
from .headline import ABSENT
from .paired import Difference, Spread, difference, spread
from .runs import Run, number, of_student

SHARE = "share/"


@dataclass(frozen=True)
class Arm:
    """One recipe of a comparison.

    Args:
        name: in the table.
        cost: of the recipe.
        runs: finished ones, by seed.
    """

    name: str
    cost: Cost
    runs: Mapping[int, Run]


@dataclass(frozen=True)
class Row:
    """What an arm reached.

    Args:
        name: of the arm.
        seeds: of its runs.
        last: accuracy after the last step, 0 to 1.
        best: accuracy of the best epoch, for comparison with tables that select on the test set.
        difference: of the last accuracy to the first arm's, on the same seeds; None for the first arm.
        seconds: of training, mean.
        steps: optimizer steps of all phases.
        trained_passes: forward and backward passes of networks that are trained, in batches.
        frozen_passes: forward passes of networks that are only read.
        shares: by loss term, the norm of its gradient relative to the cross-entropy's: mean of the first, middle and
            last third of the measurements in phases of the student, then over seeds; one mean of fewer than three.
    """

    name: str
    seeds: tuple[int, ...]
    last: Spread | None
    best: Spread | None
    difference: Difference | None
    seconds: float | None
    steps: int | None
    trained_passes: int | None
    frozen_passes: int | None
    shares: dict[str, tuple[float, ...]]


def rows(arms: Sequence[Arm]) -> list[Row]:
    """One for each arm; differences are to the first."""
    last = [{seed: run.accuracy for seed, run in arm.runs.items() if run.accuracy is not None} for arm in arms]
    return [
        _row(arm, difference(values, last[0]) if index else None)
        for index, (arm, values) in enumerate(zip(arms, last, strict=True))
    ]


def _row(arm: Arm, paired: Difference | None) -> Row:
    runs = list(arm.runs.values())
    seconds = [value for run in runs if run.end and (value := number(run.end, "seconds")) is not None]
    steps = int(runs[0].end["step"]) if runs and runs[0].end else None
    return Row(
        name=arm.name,
        seeds=tuple(arm.runs),
        last=spread([run.accuracy for run in runs if run.accuracy is not None]),
        best=spread([run.best_accuracy for run in runs if run.best_accuracy is not None]),
        difference=paired,
        seconds=statistics.mean(seconds) if seconds else None,
        steps=steps,
        trained_passes=None if steps is None else round(steps * arm.cost.trained),
        frozen_passes=None if steps is None else round(steps * arm.cost.frozen),
        shares=_shares(runs),
    )


def _shares(runs: Sequence[Run]) -> dict[str, tuple[float, ...]]:
    measured = [[r for r in run.records if r["event"] == "shares" and of_student(r)] for run in runs]
    names = dict.fromkeys(key for records in measured for record in records for key in record if key.startswith(SHARE))
    shares: dict[str, tuple[float, ...]] = {}
    for name in names:
        over_time = [[value for r in records if (value := number(r, name)) is not None] for records in measured]
        means = [[statistics.mean(part) for part in _thirds(values)] for values in over_time if values]
        if means:
            shares[name.removeprefix(SHARE)] = tuple(statistics.mean(part) for part in zip(*means, strict=False))
    return shares


def _thirds(values: list[float]) -> list[list[float]]:
    """First, middle and last third; the whole of fewer than three."""
    third = len(values) // 3
    return [values[:third], values[third:-third], values[-third:]] if third else [values]


def headings(first: str) -> tuple[str, ...]:
    """Of the table, with their units; ``first`` is the arm that differences are to."""
    return (
        *("recipe", "seeds", "last epoch, %", "best epoch, %", f"minus {first}, points [95 %]", "seconds", "steps"),
        *("trained passes", "frozen passes", "gradient / cross-entropy's, start → end"),
    )


def cells(row: Row) -> list[str]:
    """The texts of a row, in the order of ``headings``."""
    texts = [row.name, str(len(row.seeds)), _spread(row.last), _spread(row.best), _difference(row.difference)]
    texts.append("" if row.seconds is None else f"{row.seconds:,.0f}")
    texts += ["" if count is None else f"{count:,}" for count in (row.steps, row.trained_passes, row.frozen_passes)]
    # A cross-entropy is what the others are measured by.
    others = {name: values for name, values in row.shares.items() if not name.endswith("cross_entropy")}
    texts.append("; ".join(f"{name} {' → '.join(f'{v:.2g}' for v in values)}" for name, values in others.items()))
    return [text or ABSENT for text in texts]


def _spread(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.mean:.2f}" + ("" if found.std is None else f" ± {100 * found.std:.2f}")


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.2f}"
    return f"{100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def markdown(found: Sequence[Row]) -> str:
    """The table in Markdown."""
    titles = headings(found[0].name)
    lines = [titles, ["---"] * len(titles), *(cells(row) for row in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def arms_table(found: Sequence[Row]) -> Table:
    """The table for the terminal."""
    table = Table()
    for index, title in enumerate(headings(found[0].name)):
        table.add_column(title, justify="left" if index in (0, 9) else "right", overflow="fold")
    for row in found:
        table.add_row(*(Text(text) for text in cells(row)))
    return table
