"""``fewbits compare``: several recipes from the same start, with the same data, budget and seeds; one table."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Suppress

from .. import models
from ..data import Dataset
from ..recipes import Recipe, make
from ..recipes.cost import Cost, cost_of
from ..report.arms import Arm, Row, arms_table, markdown, rows
from ..report.runs import read_runs
from ..training import Settings
from ..training.checkpoint import write_file
from ..training.folder import STUDENT, as_data
from .bits import Bits
from .show import wide_console
from .train import DEFAULT_RUNS, Train, load_data, own_quantizer, parse_options, trained

JSON, MARKDOWN = "comparison.json", "comparison.md"
MEASUREMENTS = 9
"""Of the terms' shares in the gradient, in each phase: three at its start, middle and end."""


@dataclass(frozen=True)
class Compare(Train):
    """Train several recipes from the same start, with the same data, budget and seeds, and make one table.

    Each run is a folder of its own, DIR/RECIPE-sSEED, that export and report read. The same command again continues:
    finished runs are not repeated. The table is in DIR/comparison.md and, as numbers, in DIR/comparison.json.

    Args:
        recipes: names, with spaces or commas between; the first is what the others are compared with. NAME=RECIPE
            gives a name of your own, so that one recipe can take part twice: qfd,qfd4=qfd.
        options: of the recipes, as NAME:option=value; for example qfd:bits=4 logits:temperature=2.
        seeds: how many; they count up from --seed.
        teacher_epochs: train the float network so long first, once, in DIR/teacher: everyone's start and teacher.
        budget: what is equal: steps of the optimizer over all phases, or passes, where a step that trains two networks
            counts twice (fewer epochs for that recipe).
        output: DIR; by default runs/compare-MODEL-DATA-wWaA.
        settings: of the training loop; epochs is the budget of each run.
    """

    recipes: tuple[str, ...] = ("plain", "logits", "features", "qfd")
    options: tuple[str, ...] = ()
    seeds: int = 3
    teacher_epochs: float | None = None
    budget: Literal["steps", "passes"] = "steps"
    output: Path | None = None
    settings: Settings = field(default_factory=lambda: Settings(gradient_shares=MEASUREMENTS))
    recipe: Annotated[str, Suppress] = ""
    resume: Annotated[bool, Suppress] = True

    def folder(self) -> Path:
        """Where everything goes."""
        bits = f"w{self.bits.weights}a{self.bits.activations}"
        name = f"compare-{self.model}-{self.data}-{bits}"
        return self.output or DEFAULT_RUNS / "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


@dataclass(frozen=True)
class Contender:
    """One recipe that takes part.

    Args:
        name: in the table and in folders.
        recipe_name: as ``make`` takes it.
        options: as in ``Train``.
        recipe: what they make.
        cost: its passes.
    """

    name: str
    recipe_name: str
    options: tuple[str, ...]
    recipe: Recipe
    cost: Cost


def contenders(names: Sequence[str], options: Sequence[str]) -> list[Contender]:
    """Who takes part.

    Raises:
        ValueError: no name, one twice, an unknown recipe, or an option of none of them.
    """
    pairs = [entry.partition("=") for text in names for entry in text.split(",") if entry]
    chosen = {label: recipe or label for label, _, recipe in pairs}
    if not chosen:
        raise ValueError("recipes is empty; name at least one, see 'fewbits recipes'")
    if len(chosen) < len(pairs):
        twice = next(label for label, _, _ in pairs if sum(other[0] == label for other in pairs) > 1)
        raise ValueError(f"recipes has {twice!r} twice; give one of them another name: {twice},other={twice}")
    for label in chosen:
        if not re.fullmatch(r"[\w.+-]+", label):
            raise ValueError(f"names must be of letters, digits and -_.+ (they name folders), got {label!r}")
    own: dict[str, list[str]] = {label: [] for label in chosen}
    for option in options:
        label, colon, rest = option.partition(":")
        if not colon or label not in own:
            raise ValueError(f"options must look like NAME:option=value, NAME one of {', '.join(own)}; got {option!r}")
        own[label].append(rest)
    made = {label: make(recipe, parse_options(own[label])) for label, recipe in chosen.items()}
    return [Contender(label, chosen[label], tuple(own[label]), made[label], cost_of(made[label])) for label in chosen]


def compare(config: Compare) -> list[Row]:
    """Carry out ``config``: run what is missing, write and print the table; returns its rows.

    Raises:
        ValueError: anything in ``config`` that is wrong, or a run in the folder that was made with other settings.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds must be positive, got {config.seeds}; 3 or more give an interval worth reading")
    arms = contenders(config.recipes, config.options)
    _check_quantizer(config, arms)
    _check_start(config, arms)
    seeds = range(config.settings.seed, config.settings.seed + config.seeds)
    say = Console(stderr=True, quiet=not config.progress).print
    whole = load_data(replace(config, per_class=0))
    number = 0
    for seed in seeds:
        data = whole.per_class(config.per_class, seed=seed) if config.per_class else whole
        teacher = _teacher(config, seed, data)
        for arm in arms:
            number += 1
            say(f"run {number} of {len(arms) * len(seeds)}: {arm.name}, seed {seed}", highlight=False)
            trained(_run(config, arm, seed, teacher), data)
            # After each run, not at the end: whoever stops early has the table of what there is.
            found = _write(config, arms, seeds)
    table = wide_console()
    table.print(arms_table(found))
    table.print(f"wrote {config.folder() / MARKDOWN} and {JSON}", highlight=False)
    return found


def _check_quantizer(config: Compare, arms: Sequence[Contender]) -> None:
    own = {arm.name: own_quantizer(arm.recipe_name) for arm in arms if arm.recipe.quantized}
    if config.bits.quantizer is None and len(set(own.values())) > 1:
        odd = ", ".join(f"{name} for {quantizer}" for name, quantizer in own.items() if quantizer)
        raise ValueError(f"recipes are made for different quantizers ({odd}); give one for all with --quantizer")


def _check_start(config: Compare, arms: Sequence[Contender]) -> None:
    """Find out that there is no start or no teacher before hours of the recipes that need none."""
    if config.teacher_epochs is not None:
        if config.teacher is not None:
            raise ValueError("teacher and teacher_epochs exclude each other: use a teacher, or train one")
        if config.scratch:
            raise ValueError("scratch and teacher_epochs exclude each other: the network that is trained is the start")
        return
    for_teacher = [arm.name for arm in arms if arm.recipe.teacher.needs_teacher]
    for_start = any(arm.recipe.quantized for arm in arms) and not config.scratch and config.checkpoint is None
    if config.teacher is not None or not (for_teacher or for_start):
        return
    if models.pretrained(config.model, config.data, config.data_root) is None:
        raise ValueError(
            f"there are no trained weights for --model {config.model} on --data {config.data}; pass --teacher-epochs N "
            "to train the float network here, once, or --teacher FOLDER"
            + (f" (needed by {', '.join(for_teacher)})" if for_teacher else " (or --checkpoint FILE, or --scratch)")
        )
    if config.hold_out:
        warnings.warn(
            f"the pretrained {config.model} has seen the images that hold_out holds out: nothing can be tuned on them; "
            "train a float network without them: --teacher-epochs N",
            stacklevel=3,
        )


def _teacher(config: Compare, seed: int, data: Dataset) -> Path | None:
    """The float network that everyone starts from, trained if it was asked for; where data depend on the seed, each."""
    if config.teacher_epochs is None:
        return config.teacher
    first = config.settings.seed
    folder = config.folder() / "teacher"
    folder, seed = (folder / f"s{seed}", seed) if config.per_class else (folder, first)
    if not (folder / STUDENT).exists():
        Console(stderr=True, quiet=not config.progress).print(f"training the float network in {folder}")
    settings = replace(config.settings, epochs=config.teacher_epochs, seed=seed, gradient_shares=0)
    base = replace(_train(config), teacher_cache=None)
    # Double shortcuts are the students': they start from the plain network, which stays their teacher.
    bits = Bits()
    trained(replace(base, recipe="float", bits=bits, output=folder, resume=True, settings=settings), data)
    return folder


def _run(config: Compare, arm: Contender, seed: int, teacher: Path | None) -> Train:
    """One run of one arm, as ``fewbits train`` would do it."""
    factor = 1 / arm.cost.trained if config.budget == "passes" else 1.0
    return replace(
        _train(config),
        recipe=arm.recipe_name,
        bits=config.bits if arm.recipe.quantized else Bits(blocks=config.bits.blocks),
        options=arm.options,
        teacher=teacher if arm.recipe.quantized or arm.recipe.teacher.needs_teacher else None,
        output=_folder(config, arm, seed),
        resume=True,
        teacher_cache=config.teacher_cache if arm.recipe.has_steady_teacher else None,
        settings=replace(config.settings, seed=seed, epochs=config.settings.epochs * factor),
    )


def _train(config: Compare) -> Train:
    """What the two commands have in common."""
    return Train(**{entry.name: getattr(config, entry.name) for entry in fields(Train)} | {"options": ()})


def _folder(config: Compare, arm: Contender, seed: int) -> Path:
    return config.folder() / f"{arm.name}-s{seed}"


def _write(config: Compare, arms: Sequence[Contender], seeds: Sequence[int]) -> list[Row]:
    """The rows of the finished runs, left in the folder as Markdown and JSON."""
    finished: list[Arm] = []
    for arm in arms:
        there = [seed for seed in seeds if (_folder(config, arm, seed) / STUDENT).exists()]
        runs = read_runs([_folder(config, arm, seed) for seed in there]) if there else []
        finished.append(Arm(arm.name, arm.cost, dict(zip(there, runs, strict=True))))
    found = rows(finished)
    made_by = {arm.name: next(iter(arm.runs.values())).made_by for arm in finished if arm.runs}
    text = f"{_setting(config, made_by)}\n\n{markdown(found)}\n{LEGEND}"
    described = {"command": as_data(config), "rows": [asdict(row) for row in found]}
    for row, arm in zip(described["rows"], arms, strict=True):
        row |= {"recipe": as_data(arm.recipe), "runs": [_folder(config, arm, seed).name for seed in row["seeds"]]}
    write_file(config.folder() / MARKDOWN, text.encode())
    write_file(config.folder() / JSON, (json.dumps(described, indent=2, sort_keys=True) + "\n").encode())
    return found


LEGEND = """\
Mean ± sample standard deviation over the seeds; the difference is of the last epochs, paired by seed, with the 95 %
interval of Student's t. The best epoch serves only to compare with tables that select on the test set. Passes are in
batches: forward and backward through networks that are trained, forward through those that are only read. The last
column is the norm of each loss term's gradient, weight included, relative to the cross-entropy's: below 0.01 a term
proves nothing.
"""


def _setting(config: Compare, made_by: Mapping[str, dict[str, Any]]) -> str:
    """What the arms share, in one paragraph, and which of them start elsewhere."""
    run = next((run for run in made_by.values() if run["plan"]), next(iter(made_by.values())))
    plan, data, settings = run["plan"], run["data"], config.settings
    bits = f"W{plan['weights']}/A{plan['activations']} ({plan['quantizer']}" if plan else "float"
    bits += f", ends {plan['ends']}, residual {plan['residual']})" if plan else ""
    others = [f"{name}: {other['start']}" for name, other in made_by.items() if other["start"] != run["start"]]
    elsewhere = f" ({', '.join(others)})" if others else ""
    return (
        f"{run['model']} on {data['name']}, {bits}; {data['num_train']:,} training and {data['num_test']:,} "
        f"{'held-out' if config.hold_out else 'test'} images; equal {config.budget}, {settings.epochs:g} epochs, "
        f"{settings.optimizer}, learning rate {settings.lr:g}, batch {settings.batch_size}; start: {run['start']}"
        f"{elsewhere}; {run['torch_threads']} threads."
    )
