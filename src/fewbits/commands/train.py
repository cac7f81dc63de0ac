"""``fewbits train``: build or load the networks, train, leave a run folder."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from .. import data as datasets
from .. import models
from ..convert import FLOAT_BITS, Plan, quantize
from ..data import Dataset
from ..quantizers import METHODS
from ..recipes import make
from ..runs import with_blocks
from ..training import Result, Settings, fit
from .bits import Bits
from .source import SHOWN, Source, build, load_teacher, own_weights, start_from

DEFAULT_RUNS = Path("runs")

QUANTIZERS = {"dtq": "minmax", "blockwise": "bireal"}
"""Recipes that are made for another quantizer than lsq: what --quantizer defaults to."""


@dataclass(frozen=True)
class Train:
    """Train a float network, or teach a low-bit one.

    Args:
        model: resnet20, resnet32, resnet56, resnet18, vgg-small, or timm:NAME.
        data: digits, cifar10, cifar100, fashion-mnist, flowers17, or folder:PATH with one folder for each class.
        recipe: how the student is taught; see 'fewbits recipes'.
        options: of the recipe, as name=value; for example weight=0.5 bits=4.
        bits: of the student, and how it is quantized.
        teacher: a run folder or a weights file of the same network; also the student's start.
        checkpoint: weights that the student starts from instead.
        scratch: start from random weights where there is neither teacher nor checkpoint.
        output: run folder; by default runs/MODEL-DATA-RECIPE-wWaA-sSEED.
        resume: continue the run in the output folder; without one there, start afresh.
        image_size: pixels a side that images are brought to.
        data_root: the folder that holds cifar10/ and so on; by default $FEWBITS_DATA and the usual places.
        download: fetch a data set that is missing.
        hold_out: training images that replace the test split, for tuning.
        per_class: training images of each class that are kept, for little data.
        progress: show a progress bar; --no-progress does not.
        profile: leave a trace of a few early steps (profile.json.gz, for chrome://tracing) and their ten most expensive
            operators (profile.txt) in the run folder.
        teacher_cache: keep a frozen teacher's answers in this folder, so that a picture that comes again, in a later
            epoch or another run, costs no pass of the teacher.
        settings: of the training loop.
    """

    model: str
    data: str
    recipe: str = "plain"
    options: tuple[str, ...] = ()
    bits: Bits = field(default_factory=Bits)
    teacher: Path | None = None
    checkpoint: Path | None = None
    scratch: bool = False
    output: Path | None = None
    resume: bool = False
    image_size: int | None = None
    data_root: Path | None = None
    download: bool = False
    hold_out: int = 0
    per_class: int = 0
    progress: bool = True
    profile: bool = False
    teacher_cache: Path | None = None
    settings: Settings = field(default_factory=Settings)

    def folder(self) -> Path:
        """Where the run goes."""
        if self.output is not None:
            return self.output
        bits = "" if self.recipe == "float" else f"-w{self.bits.weights}a{self.bits.activations}"
        name = f"{self.model}-{self.data}-{self.recipe}{bits}-s{self.settings.seed}"
        return DEFAULT_RUNS / "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are read as JSON, else as Python, as ``fewbits recipes`` prints them, else as text.

    >>> parse_options(["weight=0.5", "reduction=mean", "retrain=false", "bits=(8, 4)", "branch=None"])
    {'weight': 0.5, 'reduction': 'mean', 'retrain': False, 'bits': (8, 4), 'branch': None}
    """
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ValueError(f"options must look like name=value, got {option!r}")
        parsed[name] = value
        for read in (ast.literal_eval, json.loads):  # the last one that can wins
            with contextlib.suppress(ValueError, SyntaxError):
                parsed[name] = read(value)
    return parsed


def train(config: Train) -> Result:
    """Carry out ``config`` and print what came of it; see ``trained``."""
    result = trained(config)
    if PartialState().is_main_process:
        best = f"accuracy {100 * result.accuracy:.2f} %, best {100 * result.best_accuracy:.2f} %"
        Console(soft_wrap=True).print(f"{best}; the run is in {result.folder}", highlight=False, markup=False)
    # gloo's threads, alive while the interpreter shuts down, can abort a process whose work is all done.
    PartialState().destroy_process_group()
    return result


def trained(config: Train, data: Dataset | None = None) -> Result:
    """Build or load the networks, train, leave a run folder.

    Args:
        config: the command.
        data: the data set that it names, where it is loaded already.

    Raises:
        ValueError: anything in ``config`` that is wrong or does not fit together.
    """
    recipe = make(config.recipe, parse_options(config.options))
    plan = _plan(config) if recipe.quantized else None
    if not recipe.quantized:
        _check_float(config)
    data = load_data(config) if data is None else data
    torch.manual_seed(config.settings.seed)
    student = build(config.model, data)
    # Looking for a network's own weights can mean a long wait for a network that is not there: not without need.
    needs_source = recipe.quantized and not (config.scratch and config.teacher is None)
    own_classes = any(term.keeps_source_classes for phase in recipe.phases() for term in phase.terms)
    source = _source(config, data, own_classes) if needs_source or recipe.teacher.needs_teacher else None
    normalisation = (source and source.normalisation) or data.normalisation
    # A double-shortcut network starts from the plain network's weights, or from its own kind's.
    is_reshaped = config.checkpoint is None and source is not None and not source.fits(student)
    if is_reshaped:
        student = with_blocks(student, config.bits.blocks)
    start = "random"
    if config.checkpoint is not None:
        if config.scratch:
            raise ValueError("scratch and checkpoint exclude each other: start from random weights, or from a file")
        start_from(student, models.load_weights(config.checkpoint))
        start = str(config.checkpoint)
    elif source is not None and source.fits(student):
        if config.scratch:
            raise ValueError(
                f"scratch has no effect: the student starts from its teacher, {source.description}, which is of its "
                "own architecture; leave --scratch out"
            )
        start_from(student, source.model.state_dict())
        start = source.description
    elif config.teacher is not None and not config.scratch:
        wrong = source.differences(student) if source is not None else []
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"teacher {config.teacher} is of another architecture than --model {config.model} for this data, or "
            f"quantized, so the student cannot start from it: {'; '.join(wrong[:SHOWN])}{more}; give the student float "
            "weights of its own with --checkpoint, or start it from --scratch"
        )
    elif not config.scratch and recipe.quantized and (own := _source(config, data, False)) is not None:
        start_from(student, own.model.state_dict())
        start = own.description
    elif recipe.quantized and not config.scratch:
        raise ValueError(_no_start(config))
    if not is_reshaped:
        student = with_blocks(student, config.bits.blocks)
    if plan is not None:
        student = quantize(student, plan=plan)
    teacher = source.model if source is not None and recipe.teacher.needs_teacher else None
    if recipe.teacher.needs_teacher and teacher is None:
        raise ValueError(_no_start(config))
    return fit(
        student,
        teacher,
        recipe=recipe,
        data=data,
        settings=config.settings,
        normalisation=normalisation,
        output=config.folder(),
        resume=config.resume,
        progress=config.progress,
        profile=config.profile,
        teacher_cache=config.teacher_cache,
        description={
            "command": "train",
            "model": config.model,
            "blocks": config.bits.blocks,
            "start": start,
            "teacher": source.description if teacher is not None and source else None,
            "recipe_name": config.recipe,
            "recipe_options": parse_options(config.options),
            "data_source": _anywhere(config.data),
            "hold_out": config.hold_out,
            "per_class": config.per_class,
        },
    )


def _check_float(config: Train) -> None:
    """Options that a float network has no use for are mistakes: whoever gives them expects something else."""
    if config.teacher is not None:
        raise ValueError(
            f"recipe {config.recipe!r} takes no teacher, got {config.teacher}; to start from its weights pass "
            "--checkpoint"
        )
    if given := [name for name in config.bits.given() if name != "--blocks"]:
        raise ValueError(
            f"recipe {config.recipe!r} trains a float network, so {', '.join(given)} would have no effect; leave that "
            "out, or take another recipe, plain for example"
        )


def _anywhere(data: str) -> str:
    """A data set's name as it holds in every directory: a folder's path is absolute."""
    if data in datasets.SOURCES:
        return data
    return f"folder:{Path(data.removeprefix('folder:')).expanduser().absolute()}"


def _source(config: Train, data: Dataset, own_classes: bool) -> Source | None:
    """The trained float network: ``--teacher``, else the model's own weights for this data."""
    if config.teacher is not None:
        return load_teacher(config.teacher, config.model, data, own_classes)
    return own_weights(config.model, config.data, data, config.data_root, own_classes)


def own_quantizer(recipe: str) -> str | None:
    """The quantizer that a recipe by name is made for; None leaves it to ``Plan.of``."""
    return next((QUANTIZERS[part] for part in recipe.split("+") if part in QUANTIZERS), None)


def _plan(config: Train) -> Plan:
    bits, own = config.bits, own_quantizer(config.recipe)
    if bits.quantizer is None and own is not None:
        there = (*METHODS[own].bits, FLOAT_BITS)
        if bits.weights not in there or bits.activations not in there:
            raise ValueError(
                f"recipe {config.recipe!r} is made for binary networks (quantizer {own}), got --weights {bits.weights} "
                f"and --activations {bits.activations}; add --weights 1 --activations 1, or choose a --quantizer"
            )
    return bits.plan(own)


def load_data(config: Train) -> Dataset:
    """The data set that ``config`` names, made smaller as it asks."""
    data = datasets.load(config.data, config.data_root, config.download, config.image_size)
    if config.hold_out:
        data = data.hold_out(config.hold_out, seed=0)
    if config.per_class:
        data = data.per_class(config.per_class, seed=config.settings.seed)
    return data


def _no_start(config: Train) -> str:
    return (
        f"there are no trained weights for --model {config.model} on --data {config.data}; train the float network "
        f"first with 'fewbits train --model {config.model} --data {config.data} --recipe float --output FOLDER' and "
        "pass --teacher FOLDER (or --checkpoint FILE, or --scratch for recipes without a teacher)"
    )
