"""``fewbits summary``, ``report``, ``data`` and ``recipes``: what there is, for people to read."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import data as datasets
from .. import models
from ..convert import FLOAT_BITS, quantize
from ..recipes import RECIPES, Recipe, make
from ..recipes.cost import cost_of
from ..report import DISPENSABLE, comparison
from ..report import report as write_report
from ..runs import with_blocks
from ..summary import Summary as LayerSummary
from ..summary import summarize
from ..training import read_json
from ..training.folder import RUN
from .bits import Bits
from .runs import load_run
from .source import build
from .tables import print_table

WIDE = 200
"""Columns of a table where no terminal says how wide it is: a log, a pipe."""

SPARE = ("shapes", "state", "kind", "parameters", "MACs", "bit ops", "remarks")
"""What a summary does without in a narrow terminal, the first ones first."""


def wide_console() -> Console:
    """A console that does not fold tables into 80 columns when its output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


@dataclass(frozen=True)
class Summary:
    """Print bits, shapes, parameters, operations and bytes of every layer, and what stays float and why.

    Args:
        run: a run folder; or give model and data.
        model: as in train.
        data: as in train; gives channels, classes and image size.
        bits: as in train; 32 and 32 show the float network.
        data_root: the folder that holds the data sets.
    """

    run: Path | None = None
    model: str | None = None
    data: str = "cifar10"
    bits: Bits = field(default_factory=Bits)
    data_root: Path | None = None


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about one run or several.

    Args:
        runs: run folders.
        output: the page; by default report.html in the first folder.
    """

    runs: tuple[Path, ...]
    output: Path | None = None


@dataclass(frozen=True)
class Data:
    """List the data sets: which are found, where, and how to get the others.

    Args:
        data_root: the folder that holds the data sets; by default $FEWBITS_DATA and the usual places.
    """

    data_root: Path | None = None


@dataclass(frozen=True)
class Recipes:
    """List the recipes: paper, what they need, what they cost, and their options."""


def summary(config: Summary) -> LayerSummary:
    """Carry out ``config``; for a run, ``summary.json`` is left in its folder."""
    if config.run is not None:
        given = (["--model"] if config.model is not None else []) + config.bits.given()
        if given:
            raise ValueError(f"run and {', '.join(given)} exclude each other: a run knows its network and its bits")
        network, _ = load_run(config.run)
        described = read_json(config.run / RUN)["data"]
        shape = (1, described["channels"], described["image_size"], described["image_size"])
    elif config.model is not None:
        data = datasets.load(config.data, config.data_root)
        network = with_blocks(build(config.model, data), config.bits.blocks)
        if not config.bits.weights == config.bits.activations == FLOAT_BITS:
            network = quantize(network, plan=config.bits.plan())
        shape = (1, data.channels, data.image_size, data.image_size)
    else:
        raise ValueError(f"give --run FOLDER, or --model with one of {', '.join(models.names())} or timm:NAME")
    table = summarize(network.eval(), torch.zeros(shape))
    if config.run is not None:
        (config.run / "summary.json").write_text(json.dumps(table.to_data(), indent=2, sort_keys=True) + "\n")
    print_table(wide_console(), table.table(), SPARE, wraps=("remarks",))
    return table


def report(config: Report) -> Path:
    """Carry out ``config``; returns the page."""
    if not config.runs:
        raise ValueError("runs is empty; name at least one run folder")
    page = write_report(config.runs, config.output or config.runs[0] / "report.html")
    console = wide_console()
    print_table(console, comparison(config.runs), DISPENSABLE)
    console.print(f"wrote {page}", highlight=False)
    return page


def data(config: Data) -> list[datasets.Found]:
    """Carry out ``config``."""
    table = Table("data set", "found", "train", "test", "where, or how to get it")
    rows = datasets.find(config.data_root)
    for row in rows:
        table.add_row(
            row.name, "yes" if row.found else "no", f"{row.num_train:,}", f"{row.num_test:,}", row.where or row.get
        )
    Console().print(table)
    return rows


def recipes(config: Recipes) -> list[str]:
    """Carry out ``config``; returns the names."""
    table = Table("recipe", "what it does", "paper", "needs", "cost", "options (--options name=value ...)")
    for name, function in RECIPES.items():
        recipe = make(name)
        parameters = inspect.signature(function).parameters.values()
        what = CITATION.sub("", (inspect.getdoc(function) or "").splitlines()[0])
        cells = (name, what, paper_of(function), _needs(recipe), cost_text(recipe))
        table.add_row(*map(Text, cells), Text(" ".join(f"{p.name}={p.default}" for p in parameters)))
    console = wide_console()
    print_table(
        console, table, ("paper", "needs"), wraps=("what it does", "cost", "options (--options name=value ...)")
    )
    console.print(
        "cost: passes for each optimizer step, plain training is 1: forward and backward through networks that are "
        "trained, then forward through those that are only read; phases with their share of the budget"
    )
    return list(RECIPES)


CITATION = re.compile(r" ?\(([^()]*\bet al\.[^()]*)\)")


def paper_of(function: Callable[..., Recipe]) -> str:
    """The citation in a recipe's first line, else in its file's; nothing where there is none.

    >>> paper_of(RECIPES["qfd"]), paper_of(RECIPES["plain"])
    ('Zhu et al., AAAI 2023', '')
    """
    for described in (function, sys.modules[function.__module__]):
        found = CITATION.search((inspect.getdoc(described) or "").partition("\n")[0])
        if found:
            return found[1]
    return ""


def cost_text(recipe: Recipe) -> str:
    """Passes for each step, and phases where there are several.

    >>> cost_text(make("qfd"))
    '1 trained + 0.8 read; teacher 20 %, student 80 %'
    """
    cost, phases = cost_of(recipe), recipe.phases()
    text = f"{cost.trained:.3g} trained" + (f" + {cost.frozen:.3g} read" if cost.frozen else "")
    shares = ", ".join(f"{phase.name} {phase.share:.0%}".replace("%", " %") for phase in phases)
    return f"{text}; {shares}" if len(phases) > 1 else text


def _needs(recipe: Recipe) -> str:
    student = "low-bit student" if recipe.quantized else "float student"
    return f"{student}, teacher" if recipe.teacher.needs_teacher else student
