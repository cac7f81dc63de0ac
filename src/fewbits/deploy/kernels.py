"""Which kernel serves a layer: the fastest on this machine among those that give the same codes, from measured times.

``choose`` is a pure function of the ways that there are and of their times. Times are kept in ``kernels.json`` in the
user's cache folder, by processor, engine and number of threads; what was measured elsewhere is never looked at.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from ..data import cache_dir
from .sessions import missing

Kind = Literal["xnor", "int8", "float", "planes"]
"""XNOR convolution of one-bit weights and signs; integers of eight bits; float; XNOR convolutions of few levels."""

PREFERENCE: tuple[Kind, ...] = get_args(Kind)
"""Where nothing was measured the first of these that a layer can have: XNOR for 1/1, else int8, and never planes."""

MARGIN, LEAST_MS = 0.05, 0.005
"""By this share, and by so many milliseconds, another kernel has to be faster than the preferred one: less is noise."""

Times = Mapping[str, Mapping[Kind, float]]
"""Milliseconds of one image by kernel, by what a layer's time depends on."""

FASTER = "float is the fastest way here"
"""Why a layer that could run on integers runs in float."""

METADATA = "kernels"
"""Key in a file's metadata: the kernels of layers that have another one than the preferred."""

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """A layer's kernel.

    Args:
        kind: of kernel.
        why: the measured times, or that there are none.
    """

    kind: Kind
    why: str


def preferred(kinds: Sequence[Kind]) -> Kind:
    """The kernel of a layer of which nothing was measured."""
    return min(kinds, key=PREFERENCE.index)


def choose(kinds: Sequence[Kind], shapes: Sequence[str], times: Times) -> Choice:
    """The fastest of ``kinds``, if all of them were measured, else the preferred one.

    Args:
        kinds: ways that give the same codes, at least one.
        shapes: what the layer's time depends on, once for each time that it runs; empty if that is not known.
        times: what was measured.

    >>> choose(["int8", "planes"], ["a"], {"a": {"int8": 0.3, "planes": 0.2}})
    Choice(kind='planes', why='measured: planes 0.200 ms, int8 0.300 ms')
    >>> choose(["int8", "planes"], ["a"], {})
    Choice(kind='int8', why='default: not measured')
    """
    first = preferred(kinds)
    if len(kinds) == 1:
        return Choice(first, "the only way")
    if not shapes or not all(kind in times.get(shape, {}) for shape in shapes for kind in kinds):
        return Choice(first, "default: not measured")
    total = {kind: sum(times[shape][kind] for shape in shapes) for kind in kinds}
    ranked = sorted(kinds, key=lambda kind: (total[kind], PREFERENCE.index(kind)))
    gain = total[first] - total[ranked[0]]
    kind = ranked[0] if gain > max(MARGIN * total[first], LEAST_MS) else first
    return Choice(kind, "measured: " + ", ".join(f"{k} {total[k]:.3f} ms" for k in ranked))


def table_path() -> Path:
    """Where measured times are kept: ``$FEWBITS_CACHE``, else ``~/.cache/fewbits``."""
    return cache_dir() / "kernels.json"


def machine(engine: str, threads: int) -> str:
    """What measured times are true of: processor, engine with its version, threads.

    Raises:
        ImportError: the engine is not installed.
    """
    try:
        return f"{processor()}, {engine} {version(engine)}, threads {threads}"
    except PackageNotFoundError as error:
        raise missing(error, engine if engine == "openvino" else "onnx") from error


def processor() -> str:
    """The processor's name, on Linux with family and model, for names alone are shared by generations."""
    source = Path("/proc/cpuinfo")
    text = source.read_text() if source.exists() else ""
    found = [re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    name, family, model = (match.group(1).strip() if match else "" for match in found)
    if not name:
        return platform.processor() or platform.machine()
    return f"{name} ({family}/{model})" if family else name


def read(path: Path, where: str) -> dict[str, dict[Kind, float]]:
    """The times that were measured on the machine ``where``; none if the file is damaged, which is a warning."""
    try:
        return _machines(path).get(where, {})
    except ValueError as error:
        warnings.warn(
            f"{path} is damaged ({error}): kernels are chosen as if nothing was measured; measure again with fewbits "
            "bench RUN --kernels, which replaces it",
            stacklevel=2,
        )
        return {}


def planes_win(engine: str, threads: int) -> bool:
    """Whether planes are the fastest of any layer that was measured on this machine."""
    times = read(table_path(), machine(engine, threads))
    return any(choose(list(row), [shape], times).kind == "planes" for shape, row in times.items() if row)


def store(path: Path, where: str, times: Times) -> None:
    """Add times of the machine ``where``, in one rename; other machines' times and other shapes stay."""
    try:
        machines = _machines(path)
    except ValueError:
        machines = {}
    machines[where] = machines.get(where, {}) | {shape: dict(row) for shape, row in times.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"format": FORMAT, "machines": machines}, indent=1, sort_keys=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(content + "\n")
    os.replace(file.name, path)


def _machines(path: Path) -> dict[str, dict[str, dict[Kind, float]]]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    machines: Any = found.get("machines")
    if not (_is_table(machines) and all(_is_table(m) for m in machines.values())):
        raise ValueError("it is not a table of machines and shapes")
    for times in (row for m in machines.values() for row in m.values()):
        if not _is_table(times) or not all(k in PREFERENCE and _is_time(ms) for k, ms in times.items()):
            raise ValueError(f"{str(times)[:100]} are not times of {', '.join(PREFERENCE)}")
    return machines


def _is_table(found: object) -> bool:
    return isinstance(found, dict)


def _is_time(found: object) -> bool:
    return isinstance(found, float | int) and not isinstance(found, bool) and math.isfinite(found) and found > 0


def written(choices: Mapping[str, Choice], kinds: Mapping[str, Sequence[Kind]]) -> dict[str, str]:
    """For a file's metadata: whoever builds the file again needs the kernels that are not the preferred ones."""
    other = {layer: c.kind for layer, c in choices.items() if c.kind != preferred(kinds[layer])}
    return {METADATA: json.dumps(other, sort_keys=True)} if other else {}


def read_written(metadata: Mapping[str, str], kinds: Mapping[str, Sequence[Kind]]) -> dict[str, Kind]:
    """The kernel of each layer: the inverse of ``written``.

    Raises:
        ValueError: the metadata name a layer, or a kernel for one, that this network cannot have.
    """
    found = json.loads(metadata.get(METADATA, "{}"))
    for layer, kind in found.items():
        if kind not in kinds.get(layer, ()):
            raise ValueError(
                f"the file says that layer {layer!r} has the kernel {kind!r}, and here it can have "
                f"{', '.join(kinds.get(layer, ())) or 'none'}: it comes from another run; export again"
            )
    return {layer: found.get(layer, preferred(ways)) for layer, ways in kinds.items()}
