"""A summary's lines as aligned text, and as a rich table."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

_TITLES = ("layer", "kind", "weights", "inputs", "state", "shapes", "parameters", "MACs", "bit ops", "bytes", "remarks")
_NUMBERS = range(6, 10)


@dataclass(frozen=True)
class Line:
    """One line; an empty text or None leaves a cell blank."""

    name: str
    kind: str = ""
    weights: str = ""
    activations: str = ""
    state: str = ""
    shapes: str = ""
    parameters: int | None = None
    macs: int | None = None
    bit_operations: int | None = None
    size_bytes: int | None = None
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts in the order of the columns."""
        return (
            self.name,
            self.kind,
            self.weights,
            self.activations,
            self.state,
            self.shapes,
            *(short(n) for n in (self.parameters, self.macs, self.bit_operations)),
            "" if self.size_bytes is None else f"{self.size_bytes:,}",
            self.note,
        )


def short(number: int | None) -> str:
    """Exact below a million, then with a unit.

    >>> short(269_722), short(40_551_680), short(None)
    ('269,722', '40.55 M', '')
    """
    if number is None:
        return ""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 100 else 1}f} {unit}"
    return f"{number:,}"


def aligned(sections: list[list[Line]]) -> str:
    """Columns of equal width, sections with a rule between them; columns that stay empty are left out."""
    lines = [line.cells for section in sections for line in section]
    used = [i for i in range(len(_TITLES)) if any(cells[i] for cells in lines)]
    widths = {i: max(len(_TITLES[i]), *(len(cells[i]) for cells in lines)) for i in used}
    rule = "  ".join("-" * widths[i] for i in used)
    text = [_aligned_line(_TITLES, widths)]
    for section in sections:
        text += [rule, *(_aligned_line(line.cells, widths) for line in section)]
    return "\n".join(text)


def _aligned_line(cells: tuple[str, ...], widths: dict[int, int]) -> str:
    return "  ".join(
        cells[i].rjust(width) if i in _NUMBERS else cells[i].ljust(width) for i, width in widths.items()
    ).rstrip()


def rich_table(title: str, sections: list[list[Line]]) -> Table:
    """The same for a rich console; names are never read as markup."""
    lines = [line.cells for section in sections for line in section]
    used = [i for i in range(len(_TITLES)) if any(cells[i] for cells in lines)]
    table = Table(title=title)
    for i in used:
        table.add_column(_TITLES[i], justify="right" if i in _NUMBERS else "left", overflow="fold")
    for section in sections:
        for line in section:
            table.add_row(*(Text(line.cells[i]) for i in used), end_section=line is section[-1])
    return table
