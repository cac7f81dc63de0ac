"""Recipes by name: one paper, one file; a new one is a line in ``RECIPES``."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import check_arguments
from ..names import unknown_name
from .base import Recipe
from .best import Best
from .blockwise import BinaryBlocks, BlockWise
from .dtq import DTQ
from .ftl import FTL
from .joint import Joint, JointTeacher
from .plain import Float, Plain
from .progressive import Progressive, ProgressiveSchedule, TwoStage, TwoStageSchedule
from .qfd import QFD, QuantizedFeature
from .rivals import Features, Logits
from .schedule import OneStage, Schedule, Stage
from .stochastic import Stochastic, StochasticSchedule
from .teacher import Frozen, NoTeacher, TeacherPolicy
from .transfer_rivals import DELTA, L2SP

RECIPES: dict[str, Callable[..., Recipe]] = {
    "float": Float,
    "plain": Plain,
    "logits": Logits,
    "features": Features,
    "ftl": FTL,
    "two-stage": TwoStage,
    "progressive": Progressive,
    "stochastic": Stochastic,
    "joint": Joint,
    "qfd": QFD,
    "dtq": DTQ,
    "l2-sp": L2SP,
    "delta": DELTA,
    "blockwise": BlockWise,
    "best": Best,
}


def make(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe called ``name``, or several in one: ``"ftl+stochastic+joint"``.

    Args:
        name: a key of ``RECIPES``, or several joined by ``+``, see ``Recipe.__add__``.
        options: of the recipe's function; of several recipes, ``"ftl.weight"`` says whose.

    Raises:
        TypeError: an option of another type than its annotation says, be the recipe listed here or a user's own.
        ValueError: the name or an option is unknown, or a value out of range; what is allowed is listed. Or two recipes
            do not combine, or one is named twice.
    """
    parts = name.split("+")
    for part in parts:
        if part not in RECIPES:
            raise ValueError(unknown_name("recipe", part, RECIPES, "several joined by '+'"))
        if parts.count(part) > 1:
            raise ValueError(f"recipe {name!r} names {part!r} {parts.count(part)} times; name it once, see its options")
    chosen: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for option, value in (options or {}).items():
        part, _, own = option.rpartition(".") if len(parts) > 1 else (name, "", option)
        if part not in chosen:
            raise ValueError(f"option {option!r} must say which recipe it is of: {' or '.join(parts)}, then '.NAME'")
        known = inspect.signature(RECIPES[part]).parameters
        if own not in known:
            raise ValueError(f"recipe {part!r} has no option {own!r}; it takes {', '.join(known) or 'none'}")
        chosen[part][own] = value
    for part, given in chosen.items():
        check_arguments(RECIPES[part], given, f"{part}." if len(parts) > 1 else "")
    return functools.reduce(operator.add, (RECIPES[part](**given) for part, given in chosen.items()))


__all__ = [
    "DELTA",
    "DTQ",
    "FTL",
    "L2SP",
    "QFD",
    "RECIPES",
    "Best",
    "BinaryBlocks",
    "BlockWise",
    "Features",
    "Float",
    "Frozen",
    "Joint",
    "JointTeacher",
    "Logits",
    "NoTeacher",
    "OneStage",
    "Plain",
    "Progressive",
    "ProgressiveSchedule",
    "QuantizedFeature",
    "Recipe",
    "Schedule",
    "Stage",
    "Stochastic",
    "StochasticSchedule",
    "TeacherPolicy",
    "TwoStage",
    "TwoStageSchedule",
    "make",
]
