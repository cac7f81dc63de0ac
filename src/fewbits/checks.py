"""What a value must be, said once, in its annotation: ``weight: NonNegative``; checked wherever the value is given.

Dataclasses check their fields (``Checked``), functions their arguments (``checked``). Understood are bool, int, float,
str, classes, Literal, tuple, Sequence and unions of them, and Annotated with a ``Limit`` and a text, the way out, which
ends the message. Everything else passes.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

LONG = 60
"""Characters of a value that a message shows; of an array it names the type."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Limit:
    """What holds of a number, and how it is said behind "a number". Not of NaN or infinity: those fit nothing."""

    words: str
    holds: Callable[[float], bool]


NonNegative = Annotated[float, Limit("of 0 or more", lambda x: x >= 0)]
Positive = Annotated[float, Limit("above 0", lambda x: x > 0)]
Part = Annotated[float, Limit("above 0 and at most 1", lambda x: 0 < x <= 1)]
Inside = Annotated[float, Limit("between 0 and 1", lambda x: 0 < x < 1)]
UnitInterval = Annotated[float, Limit("from 0 to 1", lambda x: 0 <= x <= 1)]
NonNegativeInt = Annotated[int, Limit("of 0 or more", lambda x: x >= 0)]
PositiveInt = Annotated[int, Limit("of 1 or more", lambda x: x >= 1)]
Bits = Annotated[int, Limit("from 1 to 8", lambda x: 1 <= x <= 8)]

_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check(name: str, value: object, kind: Any) -> None:
    """Refuse ``value`` if it is not what ``kind``, an annotation, says.

    Raises:
        TypeError: another type. The message names the argument, what was got and what is allowed.
        ValueError: the type is right, but the value is out of range or none of the choices.

    >>> check("share", 2.0, Inside)
    Traceback (most recent call last):
    ValueError: share must be a number between 0 and 1, got 2.0
    >>> check("bits", "four", Bits | None)
    Traceback (most recent call last):
    TypeError: bits must be a whole number from 1 to 8 or None, got 'four' (str)
    """
    if _fits(value, kind, True):
        return
    hints = "".join(f"; {hint}" for hint in _hints(kind))
    if _fits(value, kind, False):
        raise ValueError(f"{name} must be {_words(kind)}, got {value!r}{hints}")
    raise TypeError(f"{name} must be {_words(kind)}, got {_shown(value)}{hints}")


def check_arguments(function: Callable[..., Any], given: Mapping[str, object], prefix: str = "") -> None:
    """Refuse arguments that are not what the annotations of ``function`` say; see ``check``."""
    kinds = _kinds(function)
    for name, value in given.items():
        if name in kinds:
            check(prefix + name, value, kinds[name])


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose arguments are checked at each call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_arguments(function, signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return call


class Checked:
    """A dataclass whose fields are checked when it is made; a list where a tuple belongs becomes one."""

    def __post_init__(self) -> None:
        own: Any = type(self)  # a dataclass
        kinds = _kinds(own)
        for field in dataclasses.fields(own):
            value = getattr(self, field.name)
            check(field.name, value, kinds.get(field.name, Any))
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))


def check_network(name: str, value: object) -> None:
    """Refuse what is no network, and say how to come by one.

    Raises:
        TypeError: it is a name, a class, a result of training or something else.
    """
    if isinstance(value, nn.Module):
        return
    if isinstance(value, str):
        hint = f"build it: fewbits.models.build({value!r}, num_classes=...)"
    elif isinstance(value, type):
        hint = f"make an object of the class: {value.__name__}(...)"
    elif isinstance(getattr(value, "student", None), nn.Module):
        hint = "pass its .student"
    else:
        hint = "for example fewbits.models.build('resnet20', num_classes=10)"
    got = repr(value) if isinstance(value, str | type) else type(value).__name__
    raise TypeError(f"{name} must be a network, a torch.nn.Module, got {got}; {hint}")


@functools.cache
def _kinds(annotated: Any) -> dict[str, Any]:
    # Names that only a type checker knows cannot be resolved; whoever writes them does without the checks.
    with contextlib.suppress(NameError):
        return get_type_hints(annotated, include_extras=True)
    return {}


def _fits(value: object, kind: Any, whole: bool) -> bool:
    """Whether ``value`` is of the ``kind``; not ``whole``: of its type alone."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit for limit in inner[1:] if isinstance(limit, Limit)]
        return _fits(value, inner[0], whole) and not (whole and any(not limit.holds(value) for limit in limits))  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return any(_fits(value, one, whole) for one in inner)
    if origin is Literal:
        # Not by equality alone: 1 == True.
        return any(type(value) is type(one) and (value == one or not whole) for one in inner)
    if origin in (tuple, collections.abc.Sequence):
        if not isinstance(value, tuple | list):
            return False
        if origin is tuple and inner[-1:] != (Ellipsis,):
            return len(value) == len(inner) and all(map(functools.partial(_fits, whole=whole), value, inner))
        return all(_fits(one, inner[0], whole) for one in value)
    if kind in (int, float):
        is_number = isinstance(value, kind | int) and not isinstance(value, bool)
        return is_number and (not whole or math.isfinite(value))  # type: ignore[arg-type]
    kind = type(None) if kind is None else origin or kind
    is_open = kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False)
    return is_open or isinstance(value, kind)


def _shown(value: object) -> str:
    text, name = repr(value), type(value).__name__
    if len(text) > LONG or "\n" in text:
        return f"a {name}"
    return text if value is None else f"{text} ({name})"


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join([_words(inner[0]), *(limit.words for limit in inner[1:] if isinstance(limit, Limit))])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in inner)
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    if origin in (tuple, collections.abc.Sequence):
        return f"a list, each {_words(inner[0])}" if inner else "a list"
    if kind in (None, type(None)):
        return "None"
    kind = origin or kind
    return _NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def _hints(kind: Any) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return [*_hints(inner[0]), *(hint for hint in inner[1:] if isinstance(hint, str))]
    return [hint for one in inner for hint in _hints(one)] if origin in (Union, types.UnionType) else []
