"""The figure of the README from what ``train_step.py --json`` measured: a bar for each row, as a ratio to eager float.

python benchmarks/plot_steps.py benchmarks/results/steps-resnet20.json docs/steps-resnet20.svg
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path

NAMES, BAR, HEIGHT, RATIO = 400, 360, 22, 2.5
"""Pixels for the names and for RATIO times float, and of a row."""

COLOURS = {"float": "#777777", "fewbits": "#0072b2"}
PEERS = "#e69f00"


def svg(rows: list[dict[str, object]]) -> str:
    """Bars in the order of the rows; the line stands at eager float."""
    scale, bottom = BAR / RATIO, HEIGHT * len(rows) + 10
    at = NAMES + scale
    parts = [f'<line x1="{at:.0f}" x2="{at:.0f}" y1="4" y2="{bottom}" stroke="#d55e00" stroke-dasharray="4 3"/>']
    for number, row in enumerate(rows):
        name, ratio, y = str(row["name"]), float(str(row["ratio"])), 10 + HEIGHT * number
        width = scale * min(ratio, RATIO)
        parts += [
            f'<text x="{NAMES - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{NAMES}" y="{y}" width="{width:.0f}" height="{HEIGHT - 4}" '
            f'fill="{COLOURS.get(name.split()[0], PEERS)}"/>',
            f'<text x="{NAMES + width - 6:.0f}" y="{y + 14}" text-anchor="end" fill="white">{ratio:.2f}</text>',
        ]
    parts.append(f'<text x="{at:.0f}" y="{bottom + 16}" text-anchor="middle">eager float in PyTorch = 1</text>')
    width, height = NAMES + BAR + 50, bottom + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="13">\n<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path, help="a JSON list of train_step.py")
    parser.add_argument("figure", type=Path, help="where the SVG goes")
    arguments = parser.parse_args()
    measured = [row for row in json.loads(arguments.steps.read_text()) if row["ratio"] is not None]
    arguments.figure.write_text(svg(measured))


if __name__ == "__main__":
    main()
