"""The headline table: one line for each run, the same columns in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from ..convert import FLOAT_BITS
from .runs import Run, is_float, number, read_runs

ABSENT = "–"


class Column(NamedTuple):
    """A heading with its unit, and the text of a run's cell; empty where the run does not know it."""

    heading: str
    cell: Callable[[Run], str]
    is_number: bool = True


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _model(run: Run) -> str:
    return str(run.made_by.get("model") or run.made_by.get("network") or "")


def _data(run: Run) -> str:
    data = run.made_by.get("data")
    return str(data.get("name", "")) if isinstance(data, dict) else ""


def _bits(run: Run) -> str:
    plan = run.plan
    if plan is None:
        return f"{FLOAT_BITS}/{FLOAT_BITS}"
    return f"{plan.get('weights', ABSENT)}/{plan.get('activations', ABSENT)}"


def _quantizer(run: Run) -> str:
    return "float" if run.plan is None else str(run.plan.get("quantizer", ""))


def _accuracy(run: Run) -> str:
    text = _percent(run.accuracy)
    return text if run.is_finished or not text else f"{text} (unfinished)"


def _size(run: Run) -> str:
    return "" if run.size_bytes is None else f"{run.size_bytes / 1000:,.1f}"


def _size_ratio(run: Run) -> str:
    return "" if run.size_ratio is None else f"{run.size_ratio:.1f}"


def _latency(run: Run) -> str:
    value = number(run.latency, "latency_ms") if run.latency else None
    batch = number(run.latency, "batch_size") if run.latency else None
    return "" if value is None else f"{value:.3f}" + ("" if batch is None else f" (batch {batch:.0f})")


def _latency_ratio(run: Run) -> str:
    row = run.latency
    if row is None:
        return ""
    beside = next(
        (r for r in run.bench if is_float(r) and all(r.get(k) == row.get(k) for k in ("batch_size", "threads"))), None
    )
    whole, value = number(beside, "latency_ms") if beside else None, number(row, "latency_ms")
    ratio = value / whole if whole and value is not None else number(row, "ratio")
    return "" if ratio is None else f"{ratio:.2f}"


def _difference(run: Run) -> str:
    difference = number(run.export, "max_difference")
    return "" if difference is None else f"{difference:.2g}"


def _engine(run: Run) -> str:
    return str(run.export.get("engine", ""))


COLUMNS: tuple[Column, ...] = (
    Column("run", lambda run: run.name, False),
    Column("model", _model, False),
    Column("data", _data, False),
    Column("recipe", lambda run: run.recipe, False),
    Column("bits W/A", _bits, False),
    Column("quantizer", _quantizer, False),
    Column("accuracy, %", _accuracy),
    Column("best, %", lambda run: _percent(run.best_accuracy)),
    Column("engine", _engine, False),
    Column("in the engine, %", lambda run: _percent(number(run.export, "accuracy_engine"))),
    Column("file, kB", _size),
    Column("times smaller", _size_ratio),
    Column("latency, ms", _latency),
    Column("latency / float", _latency_ratio),
    Column("equal predictions, %", lambda run: _percent(number(run.export, "equal_predictions"))),
    Column("largest difference", _difference),
)

DISPENSABLE = (
    *("largest difference", "equal predictions, %", "data", "model", "best, %", "quantizer", "engine"),
    *("latency, ms", "recipe", "latency / float", "in the engine, %"),
)
"""Columns that a narrow terminal does without, the first ones first; the page shows them all."""


def cells(run: Run) -> list[str]:
    """The texts of a run's line, in the order of ``COLUMNS``."""
    return [column.cell(run) or ABSENT for column in COLUMNS]


def comparison(folders: Sequence[Path]) -> Table:
    """The runs side by side, for the terminal.

    Accuracy is the student's after its last step; ``best`` is that of the best evaluation and only for comparison
    with tables that select on the test set. Latency is the median at the smallest batch that was measured. The last two
    columns compare the engine with PyTorch: predictions, and the logits' largest difference.

    Args:
        folders: of the runs.

    Raises:
        ValueError: there is none, or one is no run folder, or holds a damaged file.
    """
    table = Table()
    for column in COLUMNS:
        table.add_column(column.heading, justify="right" if column.is_number else "left", overflow="fold")
    for run in read_runs(folders):
        table.add_row(*(Text(text) for text in cells(run)))
    return table
