"""The kernels of a network's layers, from measured times that are kept, taken anew, or left aside."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from . import kernels
from .kernels import Choice

if TYPE_CHECKING:
    import onnx_ir as ir

    from .candidates import Candidates
    from .engines import Engine

Source = Literal["table", "measure", "default"]
"""Where times come from: what was measured on this machine before; measured now; nowhere."""

REPEATS = 30
"""Measurements of a layer on a kernel."""


def choices(
    engine: Engine, name: str, traced: ir.Model, student: nn.Module, source: Source, *, threads: int, binary: bool
) -> tuple[dict[str, Choice], dict[str, str]]:
    """The kernel of every layer that has a choice of them, and what of it goes into a file's metadata.

    Args:
        engine: that the file is for, and its ``name``.
        name: of the engine.
        traced: from ``graph.trace``.
        student: the network that it was traced from.
        source: of the times.
        threads: of the engine.
        binary: whether the file has words for binary convolutions; without them planes are no choice.

    Raises:
        ValueError: another source, or fewer threads than one.
    """
    if source not in get_args(Source):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Source))}, got {source!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    found = engine.candidates(traced, student)
    if not binary:
        found = {layer: _without_planes(ways) for layer, ways in found.items()}
    times: kernels.Times = {}
    if source == "measure" and found:
        times = engine.measure(found, student, threads=threads, repeats=REPEATS)
        kernels.store(kernels.table_path(), kernels.machine(name, threads), times)
    elif source == "table" and found:
        times = kernels.read(kernels.table_path(), kernels.machine(name, threads))
    made = {layer: kernels.choose(ways.kinds, ways.shapes, times) for layer, ways in found.items()}
    return made, kernels.written(made, {layer: ways.kinds for layer, ways in found.items()})


def _without_planes(ways: Candidates) -> Candidates:
    return replace(ways, kinds=tuple(kind for kind in ways.kinds if kind != "planes"))
