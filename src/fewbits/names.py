"""A name that is none of the choices: one way to say so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(argument: str, got: object, choices: Iterable[str], also: str = "") -> str:
    """The message for a name that does not exist, with the one that was probably meant.

    Args:
        argument: what the name was given for.
        got: the name.
        choices: the names that exist.
        also: what else may be given.

    >>> unknown_name("recipe", "qdf", ["plain", "qfd"])
    "recipe must be one of plain, qfd, got 'qdf'; did you mean qfd?"
    >>> unknown_name("data", 3, ["digits", "cifar10"], "folder:PATH")
    'data must be one of digits, cifar10, or folder:PATH, got 3'
    """
    names = list(choices)
    close = difflib.get_close_matches(got.lower(), names, n=1) if isinstance(got, str) else []
    listed = ", ".join([*names, f"or {also}"] if also else names)
    return f"{argument} must be one of {listed}, got {got!r}" + (f"; did you mean {close[0]}?" if close else "")
