"""One HTML page that needs nothing but a browser: no network, no server, no other file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..training.checkpoint import write_file
from .figures import Figure, figures
from .runs import Run, read_runs
from .sections import element, headline, layers, origins, reconstructions, settings

HEIGHT = 420
"""Pixels of a figure."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6470; --page: #ffffff; --band: #f4f6f8; --line: #d9dee4;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa4af; --page: #14171b; --band: #1d2126;
  --line: #343a42; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1rem 4rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
.soft, .note { color: var(--soft); } .note { font-size: .875rem; margin: .5rem 0; max-width: 60rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { background: var(--band); font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody tr { border-top: 1px solid var(--line); } tbody td:first-child { font-weight: 600; }
th.n, td.n { text-align: right; }
.wrap td { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.wrap td:first-child { white-space: nowrap; }
.remarks { font-size: .875rem; color: var(--soft); padding-left: 1.2rem; }
.figure { width: 100%; overflow: hidden; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; } details .wide { margin-top: .6rem; }
pre { overflow-x: auto; font: .8rem/1.45 ui-monospace, Menlo, Consolas, monospace; margin: .6rem 0 0; }
dl { font-size: .925rem; } dt { font-weight: 600; } dd { margin: 0 0 .6rem; color: var(--soft); }
"""

SCRIPT = """
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 40rem)");
  function draw() {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
    for (const source of document.querySelectorAll("script[type='application/json']")) {
      const figure = JSON.parse(source.textContent), target = document.getElementById(source.dataset.figure);
      const layout = Object.assign(figure.layout, {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, size: 13,
        family: "system-ui, sans-serif" }, margin: { t: 12, r: 12, b: 48, l: narrow.matches ? 48 : 64 },
        hoverlabel: { namelength: -1 },
      });
      layout.legend = { orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font: { size: 12 } };
      for (const key of Object.keys(layout)) {
        if (!/^[xy]axis/.test(key)) continue;
        Object.assign(layout[key], { gridcolor: line, zerolinecolor: line, linecolor: line });
      }
      Plotly.react(target, figure.data, layout, { responsive: true, displayModeBar: false });
    }
  }
  draw();
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
})();
"""

# The browser itself refuses whatever is not on the page.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def report(folders: Sequence[Path], output: Path) -> Path:
    """Write one self-contained HTML page about the runs in ``folders``.

    A run folder needs ``run.json``; ``metrics.jsonl``, ``export.json``, ``bench.json`` and ``summary.json`` are shown
    where they are. The page opens from a file, asks the network for nothing, and depends on the folders alone: the same
    folders give the same page.

    Args:
        folders: of the runs, in the order in which they are shown.
        output: the page; written whole or not at all, into a folder that exists.

    Returns:
        ``output``.

    Raises:
        ValueError: no folder, a folder without a run, a damaged file, or an output that is a folder or in none.
    """
    runs = read_runs(folders)
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {output}; pass {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ValueError(f"output must be in a folder that exists, got {str(output)!r}")
    content = _page(runs)
    write_file(output, content.encode())
    return output


def _page(runs: Sequence[Run]) -> str:
    from plotly.offline import get_plotlyjs

    shown = [figure for figure in figures(runs) if figure.traces]
    absent = [element("li", escape(f"{f.title}: {f.missing}")) for f in figures(runs) if not f.traces]
    sections = [("Results", headline(runs)), *((figure.title, _drawing(figure)) for figure in shown)]
    for title, content in (
        ("Steps and ranges of each layer", layers(runs)),
        ("Reconstructions", _introduced(reconstructions(runs))),
        ("Settings that differ", settings(runs)),
        ("What made each run", origins(runs)),
        ("Not shown", element("ul", "".join(absent), class_="remarks") if absent else ""),
    ):
        if content:
            sections.append((title, content))
    body = "".join(element("section", element("h2", escape(title)) + content) for title, content in sections)
    title = "fewbits report: " + ", ".join(run.name for run in runs)
    counted = f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {', '.join(run.name for run in runs)}"
    head = "".join(
        (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            element("title", escape(title)),
            element("style", STYLE),
        )
    )
    top = element("header", element("h1", "fewbits report") + element("div", escape(counted), class_="soft"))
    scripts = element("script", get_plotlyjs()) + element("script", SCRIPT)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{top}{body}\n{scripts}</body></html>\n'


def _introduced(found: str) -> str:
    if not found:
        return ""
    said = "These recipes follow papers that leave something open; what stands here is our own choice."
    return element("p", said, class_="note") + found


def _drawing(figure: Figure) -> str:
    height = f"height:{figure.layout.get('height', HEIGHT)}px"
    # No text may end the script element that holds it.
    data = json.dumps(_finite({"data": figure.traces, "layout": figure.layout}), allow_nan=False).replace(
        "<", "\\u003c"
    )
    return "".join(
        (
            element("p", escape(figure.note), class_="note"),
            element("div", "", class_="figure", id=f"figure-{figure.key}", style=height),
            f'<script type="application/json" data-figure="figure-{figure.key}">{data}</script>',
        )
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: a point that is not a number is left out of its curve."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
