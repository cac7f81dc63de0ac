"""The commands: each is one dataclass and one public function; a new one is a line in ``COMMANDS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bench import Bench, bench
from .bits import Bits
from .compare import Compare, compare
from .demo import Demo, demo
from .pack import Pack, pack
from .parity import Engines, Parity, engines, parity
from .runs import load_run, run_data
from .ship import Export, export
from .show import Data, Recipes, Report, Summary, data, recipes, report, summary
from .train import Train, train

COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "train": (Train, train),
    "compare": (Compare, compare),
    "export": (Export, export),
    "parity": (Parity, parity),
    "bench": (Bench, bench),
    "pack": (Pack, pack),
    "engines": (Engines, engines),
    "report": (Report, report),
    "summary": (Summary, summary),
    "data": (Data, data),
    "recipes": (Recipes, recipes),
    "demo": (Demo, demo),
}

__all__ = [
    "COMMANDS",
    "Bench",
    "Bits",
    "Compare",
    "Data",
    "Demo",
    "Engines",
    "Export",
    "Pack",
    "Parity",
    "Recipes",
    "Report",
    "Summary",
    "Train",
    "bench",
    "compare",
    "data",
    "demo",
    "engines",
    "export",
    "load_run",
    "pack",
    "parity",
    "recipes",
    "report",
    "run_data",
    "summary",
    "train",
]
