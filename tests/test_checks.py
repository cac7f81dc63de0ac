"""What annotations say is what is let in: by type, by range, by choice; and the message says all of it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy
import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.checks import (
    Bits,
    Checked,
    Inside,
    NonNegative,
    Part,
    Positive,
    PositiveInt,
    UnitInterval,
    check,
    check_network,
    checked,
)


class Walks(Protocol):
    def walk(self) -> None: ...


FITS: list[tuple[Any, Any]] = [
    (True, bool),
    (3, int),
    (3, float),
    (0.5, float),
    ("a", str),
    (None, None),
    (None, float | None),
    (0.0, NonNegative),
    (1.0, Part),
    (0, UnitInterval),
    (1, UnitInterval),
    (8, Bits),
    (32, Bits | Literal[32] | None),
    ("sum", Literal["sum", "mean"]),
    (-1, Literal[1, -1]),
    ([8, 4], tuple[Bits, ...]),
    ((), tuple[Bits, ...]),
    ((1, "a"), tuple[int, str]),
    (["a"], Sequence[str]),
    ("a", str | Sequence[str] | None),
    ({"a": 1}, dict[str, int]),
    (object(), Any),
    (object(), Walks),
    (nn.ReLU(), nn.Module),
]

MISFITS: list[tuple[Any, Any, type[Exception], str]] = [
    (1, bool, TypeError, "it must be true or false, got 1 (int)"),
    ("maybe", bool, TypeError, "it must be true or false, got 'maybe' (str)"),
    (True, int, TypeError, "it must be a whole number, got True (bool)"),
    (True, float, TypeError, "it must be a number, got True (bool)"),
    (2.0, int, TypeError, "it must be a whole number, got 2.0 (float)"),
    ("3", float, TypeError, "it must be a number, got '3' (str)"),
    (torch.tensor(1.0), float, TypeError, "it must be a number, got tensor(1.) (Tensor)"),
    (numpy.zeros(99), Tensor, TypeError, "it must be a Tensor, got a ndarray"),
    (None, float, TypeError, "it must be a number, got None"),
    (math.nan, float, ValueError, "it must be a number, got nan"),
    (math.inf, Positive, ValueError, "it must be a number above 0, got inf"),
    (math.nan, NonNegative, ValueError, "it must be a number of 0 or more, got nan"),
    (-1, NonNegative, ValueError, "it must be a number of 0 or more, got -1"),
    (0, Positive, ValueError, "it must be a number above 0, got 0"),
    (0, Part, ValueError, "it must be a number above 0 and at most 1, got 0"),
    (1, Inside, ValueError, "it must be a number between 0 and 1, got 1"),
    (1.5, UnitInterval, ValueError, "it must be a number from 0 to 1, got 1.5"),
    (0, PositiveInt, ValueError, "it must be a whole number of 1 or more, got 0"),
    (9, Bits | Literal[32], ValueError, "it must be a whole number from 1 to 8 or 32, got 9"),
    ("avg", Literal["sum", "mean"], ValueError, "it must be one of sum, mean, got 'avg'"),
    (True, Literal[1, -1], TypeError, "it must be one of 1, -1, got True (bool)"),
    (3, tuple[int, ...], TypeError, "it must be a list, each a whole number, got 3 (int)"),
    ([8, 9], tuple[Bits, ...], ValueError, "it must be a list, each a whole number from 1 to 8, got [8, 9]"),
    ((1,), tuple[int, str], TypeError, "it must be a list"),
    ("layer1", Sequence[str], TypeError, "it must be a list, each text, got 'layer1' (str)"),
    (3, nn.Module, TypeError, "it must be a Module, got 3 (int)"),
    (2, Annotated[Inside, "half is usual"] | None, ValueError, "between 0 and 1 or None, got 2; half is usual"),
]


@pytest.mark.parametrize(("value", "kind"), FITS)
def test_what_fits(value: Any, kind: Any):
    check("it", value, kind)


@pytest.mark.parametrize(("value", "kind", "error", "said"), MISFITS)
def test_what_does_not(value: Any, kind: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=re.escape(said)):
        check("it", value, kind)


def test_fields_and_arguments():
    @dataclass(frozen=True)
    class Knobs(Checked):
        share: Inside = 0.5
        widths: tuple[int, ...] = ()

    assert Knobs(widths=[8, 4]).widths == (8, 4)  # type: ignore[arg-type]  # a frozen value has to hash
    assert hash(Knobs(widths=[8])) == hash(Knobs(widths=(8,)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share must be a number between 0 and 1, got 2"):
        Knobs(2)

    @checked
    def half(x: Positive, *, how: Literal["up", "down"] = "up") -> float:
        """Half of it."""
        return x / 2

    assert half(4, how="down") == 2
    assert half.__doc__ == "Half of it."
    for call in (lambda: half(-1), lambda: half(x=0), lambda: half(1, how="left")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be"):
            call()


def test_names_that_only_a_type_checker_knows():
    @dataclass(frozen=True)
    class Mine(Checked):
        what: "Unknown" = 3  # type: ignore[name-defined]  # noqa: F821

    assert Mine("anything").what == "anything"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("resnet20", "got 'resnet20'; build it: fewbits.models.build('resnet20', num_classes=...)"),
        (nn.Linear, "make an object of the class: Linear(...)"),
        (3, "got int; for example fewbits.models.build"),
    ],
)
def test_what_is_no_network(given: Any, hint: str):
    for call in (lambda: check_network("model", given), lambda: fb.quantize(given)):
        with pytest.raises(TypeError, match=re.escape("model must be a network, a torch.nn.Module, got ")) as caught:
            call()
        assert hint in str(caught.value)


def test_a_network_that_gives_no_logits():
    """Found: a dict ended in an AttributeError of the loss."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(x)}

    with pytest.raises(TypeError, match="the student must return its logits, a tensor N x C, got dict; wrap it"):
        fb.recipes.Float().objective(Wrapped(), batches=[torch.rand(2, 3, 2, 2)])
