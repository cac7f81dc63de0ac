"""Recipes by name: one paper, one file; a new one is a line in ``RECIPES``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .base import Frozen, NoTeacher, Recipe, TeacherPolicy
from .dtq import DTQ
from .plain import Float, Plain
from .qfd import QFD, QuantizedFeature
from .rivals import Features, Logits
from .transfer_rivals import DELTA, L2SP

RECIPES: dict[str, Callable[..., Recipe]] = {
    "float": Float,
    "plain": Plain,
    "logits": Logits,
    "features": Features,
    "qfd": QFD,
    "dtq": DTQ,
    "l2-sp": L2SP,
    "delta": DELTA,
}


def make(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe called ``name`` with the ``options`` of its function.

    Raises:
        ValueError: the name or an option is unknown; the choices are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    options = dict(options or {})
    known = inspect.signature(RECIPES[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"recipe {name!r} has no option {option!r}; it takes {', '.join(known)}")
    return RECIPES[name](**options)


__all__ = [
    "DELTA",
    "DTQ",
    "L2SP",
    "QFD",
    "RECIPES",
    "Features",
    "Float",
    "Frozen",
    "Logits",
    "NoTeacher",
    "Plain",
    "QuantizedFeature",
    "Recipe",
    "TeacherPolicy",
    "make",
]
