"""The page's figures, as the data and layout that plotly.js draws; colours of the theme are added in the browser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from ..convert import FLOAT_BITS
from .runs import Run, is_float, number, of_student

# Okabe and Ito's colours, which colour-blind readers tell apart, without those too pale for a white or a black page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6bb1", "#999999")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        key: its id on the page.
        title: heading.
        note: what to know when reading it.
        traces: plotly.js data; empty where no run has any.
        layout: plotly.js layout.
        missing: what to do where there is no data.
    """

    key: str
    title: str
    note: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    missing: str


def figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """All figures, also those without data."""
    yield from (make(runs) for make in (_accuracy, _losses, _size, _latency, _layers))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _text(value: object) -> str:
    """Plotly reads a few HTML tags in texts."""
    return escape(str(value), quote=False)


def _axis(title: str, **rest: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, **rest}


def _layout(x: dict[str, Any], y: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"xaxis": x, "yaxis": y, "showlegend": True, **rest}


def _percent(record: dict[str, Any]) -> float:
    return 100 * (number(record, "accuracy") or 0.0)


def _accuracy(runs: Sequence[Run]) -> Figure:
    traces: list[dict[str, Any]] = []
    boundaries: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        colour = _colour(index)
        phases = [(phase, list(group)) for phase, group in groupby(run.evaluations(), key=lambda r: r.get("phase", ""))]
        for place, (phase, records) in enumerate(phases):
            label = _text(run.name if len(phases) == 1 else f"{run.name}: {phase}")
            if not of_student(records[0]):
                label += " (accuracy of the teacher)"
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": label,
                    "x": [number(r, "epoch") for r in records],
                    "y": [_percent(r) for r in records],
                    "line": {"color": colour, "dash": "dot" if not of_student(records[0]) else "solid"},
                    "marker": {"size": 5},
                    "hovertemplate": "%{y:.2f} % at epoch %{x:.2f}",
                }
            )
            if place < len(phases) - 1:
                boundaries.append(_boundary(number(records[-1], "epoch"), colour))
        if run.end is not None and run.accuracy is not None:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": f"{_text(run.name)}: final",
                    "x": [number(run.end, "epoch")],
                    "y": [100 * run.accuracy],
                    "marker": {"color": colour, "size": 11, "symbol": "diamond-open", "line": {"width": 2}},
                    "hovertemplate": "%{y:.2f} %, batch norm re-estimated",
                }
            )
    return Figure(
        "accuracy",
        "Accuracy while training",
        "On the test split. Diamonds: after the last step, batch norm re-estimated. Vertical lines: a phase ends; "
        "dotted curves: the phase trains the teacher, and the accuracy is the teacher's.",
        traces,
        _layout(_axis("epochs, all phases together"), _axis("accuracy, %"), shapes=boundaries),
        "No run has been evaluated yet.",
    )


def _boundary(epoch: float | None, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1, "dash": "dash"}
    return {"type": "line", "x0": epoch, "x1": epoch, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _losses(runs: Sequence[Run]) -> Figure:
    steps = [(index, run, [r for r in run.records if r["event"] == "train"]) for index, run in enumerate(runs)]
    terms = _distinct(key for _, _, records in steps for record in records for key in record if key.startswith("loss"))
    traces: list[dict[str, Any]] = []
    for index, run, records in steps:
        for place, term in enumerate(terms):
            points = list(_points(records, term))
            # One term alone is the total.
            is_total = term == "loss" and len(_distinct(k for r in records for k in r if k.startswith("loss/"))) == 1
            if any(value is not None for _, value in points) and not is_total:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": _text(f"{run.name}: {_term(term)}"),
                        "x": [step for step, _ in points],
                        "y": [value for _, value in points],
                        "line": {"color": _colour(index), "dash": DASHES[place % len(DASHES)], "width": 1.5},
                        "marker": {"size": 3},
                        "hovertemplate": "%{y:.4g} at step %{x}",
                    }
                )
    values = [value for trace in traces for value in trace["y"] if value is not None]
    scale = {"type": "log", **_ticks(values)} if values and min(values) > 0 else {}
    return Figure(
        "losses",
        "Terms of the loss",
        "Before their weights, on training batches. Total: the weighted sum that is minimised.",
        traces,
        _layout(_axis("optimizer steps, all phases together"), _axis("loss, nats or squared feature units", **scale)),
        "No run has recorded a loss yet.",
    )


def _points(records: Sequence[dict[str, Any]], term: str) -> Iterator[tuple[int, float | None]]:
    """(step, value), with a gap where a phase ends: the next one minimises something else."""
    before = None
    for record in records:
        if before is not None and record.get("phase") != before.get("phase"):
            yield record["step"], None
        if number(record, term) is not None:
            yield record["step"], number(record, term)
        before = record


def _term(key: str) -> str:
    return key.removeprefix("loss/").replace("_", " ") if "/" in key else "total"


def _size(runs: Sequence[Run]) -> Figure:
    traces: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        totals = run.summary.get("totals", {})
        size = run.size_bytes if run.size_bytes is not None else number(totals, "size_bytes")
        if size is None or run.accuracy is None:
            continue
        is_file = run.size_bytes is not None
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _text(run.name) + ("" if is_file else " (computed)"),
                "x": [size / 1000],
                "y": [100 * run.accuracy],
                "marker": {"color": _colour(index), "size": 12, "symbol": "circle" if is_file else "circle-open"},
                "hovertemplate": "%{y:.2f} %, %{x:,.1f} kB",
            }
        )
    return Figure(
        "size",
        "Size against accuracy",
        "Filled: the exported file. Open: the run was not exported, and the size is that of its packed weights, scales "
        "and norms.",
        traces,
        _layout(
            _axis("size, kB (logarithmic)", type="log", **_ticks(x for t in traces for x in t["x"])),
            _axis("accuracy, %"),
        ),
        "No run has a size: run fewbits export or fewbits summary on it.",
    )


def _ticks(values: Iterable[float]) -> dict[str, Any]:
    """1, 2, 5, 10 and so on around ``values``: plotly's own labels of a logarithmic axis leave the zeros out."""
    found = [value for value in values if value > 0]
    if not found:
        return {}
    first, last = (math.floor(math.log10(end)) for end in (min(found), max(found)))
    ticks = [digit * 10.0**power for power in range(first, last + 2) for digit in (1, 2, 5)]
    low = max(tick for tick in ticks if tick <= min(found))
    high = min(tick for tick in ticks if tick >= max(found))
    inside = [tick for tick in ticks if low <= tick <= high]
    inside = inside if len(inside) < 9 else [tick for tick in inside if math.log10(tick).is_integer()]
    margin = 0.05 * (math.log10(high / low) or 1.0)
    return {
        "tickvals": inside,
        "ticktext": [f"{tick:,g}" for tick in inside],
        "range": [math.log10(low) - margin, math.log10(high) + margin],
    }


def _latency(runs: Sequence[Run]) -> Figure:
    traces = []
    for index, run in enumerate(runs):
        for name in _distinct(str(row.get("name", "")) for row in run.bench):
            rows = [r for r in run.bench if str(r.get("name", "")) == name and number(r, "latency_ms") is not None]
            if not rows:
                continue
            beside_float = is_float(rows[0])
            marker: dict[str, Any] = {"color": _colour(index)}
            if beside_float:
                marker |= {"opacity": 0.45, "pattern": {"shape": "/"}}
            traces.append(
                {
                    "type": "bar",
                    "name": _text(f"{run.name}: {name}"),
                    "x": [_setting(r) for r in rows],
                    "y": [number(r, "latency_ms") for r in rows],
                    "marker": marker,
                    "hovertemplate": "%{y:.3f} ms",
                }
            )
    return Figure(
        "latency",
        "Latency in the engine",
        "Median of one call, on the machine that measured it. Hatched: the float network beside it.",
        traces,
        _layout(_axis("images in a call, threads"), _axis("milliseconds", rangemode="tozero"), barmode="group"),
        "No run was measured: run fewbits bench on it.",
    )


def _setting(row: dict[str, Any]) -> str:
    threads = row.get("threads", "?")
    return _text(f"batch {row.get('batch_size', '?')}, {threads} thread{'' if threads == 1 else 's'}")


def _layers(runs: Sequence[Run]) -> Figure:
    traces = []
    for index, run in enumerate(runs):
        rows = run.summary.get("rows", [])
        if not rows:
            continue
        group = {"x": [_text(row["name"]) for row in rows], "offsetgroup": str(index)}
        traces.append(
            group
            | {
                "type": "bar",
                "name": f"{_text(run.name)}: size",
                "y": [(number(row, "size_bytes") or 0.0) / 1000 for row in rows],
                "marker": {"color": _colour(index)},
                "hovertemplate": "%{x}: %{y:.2f} kB",
            }
        )
        for side, symbol, size, width in (("weight", "circle", 6, 0), ("activation", "line-ew-open", 14, 2)):
            traces.append(
                group
                | {
                    "type": "scatter",
                    "mode": "markers",
                    "name": _text(f"{run.name}: {side} bits"),
                    "y": [bits_of(row, side) for row in rows],
                    "yaxis": "y2",
                    "marker": {"color": _colour(index), "size": size, "symbol": symbol, "line": {"width": width}},
                    "hovertemplate": "%{x}: %{y} bits",
                }
            )
    bits = _axis("bits", type="log", tickvals=[1, 2, 4, 8, 32], range=[-0.1, 1.65], domain=[0.66, 1.0])
    return Figure(
        "layers",
        "Bits and bytes of each layer",
        "In the order in which layers run. Below: packed weights, scales and bias. Above: bits of weights (dots) and "
        "of inputs (dashes).",
        traces,
        _layout(
            _axis("layer", tickangle=-60, type="category"),
            _axis("size, kB", domain=[0.0, 0.6], rangemode="tozero"),
            yaxis2=bits,
            barmode="group",
            scattermode="group",
            height=560,
        ),
        "No run has a summary.json: run fewbits summary on it.",
    )


def bits_of(row: dict[str, Any], side: str) -> int:
    """Bits of a summary row's weight or activation."""
    grid = row.get(side)
    return int(grid["bits"]) if isinstance(grid, dict) and isinstance(grid.get("bits"), int) else FLOAT_BITS


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
