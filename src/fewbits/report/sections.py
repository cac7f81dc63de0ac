"""The page's sections, each a piece of HTML; every text from a run folder is escaped here."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..recipes import RECIPES
from .figures import bits_of
from .headline import ABSENT, COLUMNS, cells
from .runs import Run, number

LONGEST = 80
"""Characters of a setting that stand in the table; all of them are in the JSON below it."""


def element(tag: str, content: str, **attributes: str) -> str:
    """An element around finished HTML; ``class_`` is ``class``."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{tag}{given}>{content}</{tag}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = (), shape: str = "wide") -> str:
    """A table of plain texts that scrolls sideways where the screen is narrow; ``"wide wrap"`` breaks long texts."""
    right = set(numeric)

    def line(tag: str, texts: Sequence[str]) -> str:
        parts = (element(tag, escape(t), **({"class_": "n"} if i in right else {})) for i, t in enumerate(texts))
        return element("tr", "".join(parts))

    body = "".join(line("td", row) for row in rows)
    whole = element("table", element("thead", line("th", head)) + element("tbody", body))
    return element("div", whole, class_=shape, tabindex="0")


def headline(runs: Sequence[Run]) -> str:
    """The table of results, and what has to be said about single runs."""
    numeric = [i for i, column in enumerate(COLUMNS) if column.is_number]
    parts = [
        table([column.heading for column in COLUMNS], map(cells, runs), numeric),
        element(
            "p",
            "Accuracy is the student's after its last step; “best” is its best evaluation, for comparison with tables "
            "that select on the test set. “Times smaller” compares with the same network in float. Latency is a "
            f"median. {ABSENT} stands for what a run does not know.",
            class_="note",
        ),
    ]
    remarks = [element("li", escape(f"{run.name}: {remark}")) for run in runs for remark in _remarks(run)]
    if remarks:
        parts.append(element("ul", "".join(remarks), class_="remarks"))
    return "".join(parts)


def _remarks(run: Run) -> Iterable[str]:
    if run.end is None:
        yield "not finished; its accuracy is that of the last evaluation"
        return
    if skipped := number(run.end, "skipped_steps"):
        yield f"{skipped:.0f} steps were skipped, for their loss or gradient was not finite"
    if (averaged := number(run.end, "ema_accuracy")) is not None:
        yield f"the average of its weights (EMA) reaches {100 * averaged:.2f} %"
    if (seconds := number(run.end, "seconds")) is not None:
        yield f"trained in {_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def reconstruction(recipe: str) -> str:
    """What our version of a recipe had to make up, from its docstring; empty where nothing is said.

    >>> reconstruction("qfd").split(":")[0]
    'Reconstruction'
    """
    names = [name for name in RECIPES if recipe == name or recipe.startswith(f"{name}-")]
    if not names:
        return ""
    function = RECIPES[max(names, key=len)]
    for text in (inspect.getdoc(function), inspect.getdoc(sys.modules[function.__module__])):
        start = (text or "").find("Reconstruction")
        if text and start >= 0:
            return " ".join(text[start:].split("\n\n")[0].split())
    return ""


def reconstructions(runs: Sequence[Run]) -> str:
    """The recipes that are in part our own guess."""
    found = {run.recipe: reconstruction(run.recipe) for run in runs}
    items = [element("dt", escape(name)) + element("dd", escape(text)) for name, text in found.items() if text]
    return element("dl", "".join(items)) if items else ""


def layers(runs: Sequence[Run]) -> str:
    """Steps and ranges of each run's layers and streams."""
    parts = []
    for run in runs:
        if not run.summary:
            continue
        totals = run.summary["totals"]
        said = f"{run.name}: {_count(totals, 'parameters')} parameters, {_count(totals, 'macs')} MACs, "
        said += f"{_count(totals, 'size_bytes')} bytes"
        parts.append(element("details", element("summary", escape(said)) + _layer_table(run)))
    return "".join(parts)


def _count(values: Mapping[str, Any], key: str) -> str:
    value = number(values, key)
    return ABSENT if value is None else f"{value:,.0f}"


def _layer_table(run: Run) -> str:
    kernels = {entry.get("name"): entry for entry in run.export.get("layers", []) if isinstance(entry, dict)}
    head = ["layer", "kind", "W/A bits", "weight step", "weight range", "input step", "input range", "MACs", "bytes"]
    rows = []
    for row in run.summary["rows"]:
        bits = "/".join(str(bits_of(row, side)) for side in ("weight", "activation"))
        grids = [text for side in ("weight", "activation") for text in _grid(row.get(side))]
        kernel = kernels.get(row["name"], {})
        remark = "; ".join(str(t) for t in (row.get("reason"), kernel.get("reason")) if t)
        engine = [str(kernel.get("kernel") or ABSENT)] if kernels else []
        line = [str(row["name"]) or ABSENT, str(row.get("kind", "")), bits, *grids]
        rows.append([*line, _count(row, "macs"), _count(row, "size_bytes"), *engine, remark])
    for stream in run.summary.get("streams", []):
        where, grid = f"{stream.get('side', '')} of {stream.get('name', '')}", stream.get("grid")
        bits = str(grid.get("bits", ABSENT)) if isinstance(grid, dict) else ABSENT
        line = [where, "stream", f"{ABSENT}/{bits}", "", "", *_grid(grid), "", _count(stream, "size_bytes")]
        rows.append([*line, *([""] if kernels else []), ""])
    return table([*head, *(["kernel"] if kernels else []), "remarks"], rows, numeric=range(3, 9))


def _grid(grid: object) -> tuple[str, str]:
    """Step and range, over the channels."""
    if not isinstance(grid, dict):
        return ABSENT, ABSENT
    step, span = grid.get("step"), grid.get("range")
    if not isinstance(step, list) or not isinstance(span, list):
        return ABSENT, ABSENT
    low, high = (f"{value:.4g}" for value in step)
    steps = low if low == high else f"{low} to {high}"
    unsure = "" if grid.get("state") == "calibrated" else f" ({grid.get('state')})"
    return steps, f"{span[0]:.4g} to {span[1]:.4g}{unsure}"


def settings(runs: Sequence[Run]) -> str:
    """What differs between the runs, from ``run.json``."""
    flat = [dict(_flat(run.made_by)) for run in runs]
    keys = sorted({key for entries in flat for key in entries})
    rows = [
        [key, *(_cut(entries[key]) if key in entries else ABSENT for entries in flat)]
        for key in keys
        if len({entries.get(key) for entries in flat}) > 1
    ]
    if not rows:
        return element("p", "The runs were made with the same settings." if len(runs) > 1 else "There is one run only.")
    return table(["setting", *(run.name for run in runs)], rows, shape="wide wrap")


def _flat(value: object, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        value = {str(index): entry for index, entry in enumerate(value, start=1)}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value) if value not in (None, []) else "none"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def origins(runs: Sequence[Run]) -> str:
    """What made each run, whole."""
    return "".join(
        element(
            "details",
            element("summary", escape(run.name))
            + element("pre", escape(json.dumps(run.made_by, indent=2, sort_keys=True, ensure_ascii=False))),
        )
        for run in runs
    )
