"""Tables that fit the terminal: columns go, rather than every cell being folded into slivers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

WRAPPED = 18
"""Least width that a column of running text is left."""


def print_table(console: Console, table: Table, spare: Sequence[str] = (), wraps: Sequence[str] = ()) -> None:
    """Print ``table``; where it is too wide, headings fold, then columns are left out, and a line below says which.

    Args:
        console: tells the width.
        table: whole; it is changed where it is too wide.
        spare: headings of columns that may be left out, the most dispensable first.
        wraps: headings of columns of running text, which may be folded.
    """
    if Measurement.get(console, console.options.update(width=10_000), table).maximum > console.width:
        left_out = _narrow(console, table, spare, wraps)
        console.print(table)
        if left_out:
            console.print(f"left out at {console.width} columns: {'; '.join(left_out)}", highlight=False)
    else:
        console.print(table)


def _narrow(console: Console, table: Table, spare: Sequence[str], wraps: Sequence[str]) -> list[str]:
    """Make ``table`` fit; returns the headings that are gone."""

    def needed(column: Column) -> int:
        cells = max((Measurement.get(console, console.options, cell).maximum for cell in column.cells), default=0)
        heading = max(cell_len(word) for word in str(column.header).split() or [""])
        return max(heading, min(cells, WRAPPED) if column.header in wraps else cells)

    def excess() -> int:
        return sum(needed(column) + 3 for column in table.columns) + 1 - console.width

    left_out: list[str] = []
    for heading in spare:
        if excess() <= 0:
            break
        table.columns[:] = [column for column in table.columns if column.header != heading]
        left_out.append(heading)
    # What nothing else helps folds the names, down to half of them.
    name, *others = table.columns
    name.width = max(needed(name) - max(excess(), 0), needed(name) // 2)
    for column in others:
        if column.header in wraps:
            column.min_width, column.overflow = needed(column), "fold"
        else:
            column.width = needed(column)
    return left_out
