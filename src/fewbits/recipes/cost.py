"""What a recipe costs, read from its phases: passes through networks, the unit of an equal budget."""

from __future__ import annotations

from dataclasses import dataclass

from ..distill import Phase, Term
from .base import Recipe


@dataclass(frozen=True)
class Cost:
    """Passes for each optimizer step, means over a run; plain training costs 1 and 0.

    Args:
        trained: forward and backward passes of networks that are trained: what an equal budget counts.
        frozen: forward passes of networks that are only read; they count in wall-clock.
    """

    trained: float
    frozen: float


def cost_of(recipe: Recipe) -> Cost:
    """The passes that ``recipe`` makes for each optimizer step.

    >>> from fewbits.recipes import Logits, Plain
    >>> cost_of(Plain()), cost_of(Logits())
    (Cost(trained=1.0, frozen=0.0), Cost(trained=1.0, frozen=1.0))
    """
    phases = recipe.phases()
    whole = sum(phase.share for phase in phases)
    trained = sum(phase.share * len({group.network for group in phase.trains}) for phase in phases)
    frozen = sum(phase.share * _num_frozen(phase) for phase in phases)
    return Cost(trained / whole, frozen / whole)


def _num_frozen(phase: Phase) -> int:
    """Networks that a phase runs without training them."""
    read = {network for term in phase.terms for network in term.logits()}
    if phase.routing == "teacher_input" or any(_reads_features(term) for term in phase.terms):
        read |= {"student", "teacher"}  # features are compared between the two
    return len(read - {group.network for group in phase.trains})


def _reads_features(term: Term) -> bool:
    return type(term).taps is not Term.taps
