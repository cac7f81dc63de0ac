"""``fewbits bench --kernels``, and what ``export`` says about the kernels of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .runs import load_run, run_data


def measure(run: Path, threads: Sequence[int], repeats: int, data_root: Path | None) -> list[dict[str, Any]]:
    """Measure every layer of a run on every kernel that it can have, and keep the times for ``export``.

    Args:
        run: a run folder.
        threads: of the engine, each in turn.
        repeats: measurements of each layer on each kernel.
        data_root: the folder that holds the data sets.
    """
    from ..deploy import measure_kernels
    from ..deploy.kernels import table_path

    student, normalisation = load_run(run)
    images = run_data(run, data_root).pixels(1)
    rows: list[dict[str, Any]] = []
    for number in threads:
        times = measure_kernels(student, example=images, normalisation=normalisation, threads=number, repeats=repeats)
        rows += [{"layer": shape, "threads": number, "ms": dict(found)} for shape, found in times.items()]
    table = Table("layer", "threads", "ms, fastest first", title="each layer alone in OpenVINO, one image")
    for row in rows:
        ranked = sorted(row["ms"].items(), key=lambda entry: entry[1])
        table.add_row(row["layer"], str(row["threads"]), ", ".join(f"{kind} {ms:.3f}" for kind, ms in ranked))
    console = Console()
    console.print(table)
    console.print(f"Kept in {table_path()}: fewbits export RUN --engine openvino chooses by it.", highlight=False)
    return rows


def together(layers: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    """What is said of layers under ``key``, each reason once behind all layers that it is true of."""
    return _said_once((layer["name"], layer[key]) for layer in layers if layer.get(key))


def explained(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kernels and why they were chosen, layers with the same reasons together."""
    return _said_once(
        (layer["name"], f"{layer['kernel']}; {layer['choice']}") for layer in layers if layer.get("choice")
    )


def _said_once(said: Iterable[tuple[str, str]]) -> list[str]:
    """``a, b: what`` for names a and b of whom the same is said."""
    names: dict[str, list[str]] = {}
    for name, what in said:
        names.setdefault(what, []).append(name)
    return [f"{', '.join(found)}: {what}" for what, found in names.items()]
