"""How the student's precision moves through its training: a schedule is a list of stages."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import Checked, Part
from ..convert import Plan
from ..distill import Edit, Group, Phase, Term
from ..distill.base import FULLY_QUANTIZED, Routing
from ..precision import PrecisionSchedule


@dataclass(frozen=True)
class Stage(Checked):
    """A stretch of the student's training, as a schedule cuts it.

    Args:
        name: for logs.
        share: of the student's part of the budget, 0 to 1.
        edits: changes of bits before it starts.
        precision: what is quantized when.
        routing: of gradients between the student's blocks.
        labels: False leaves out every term that reads logits.
    """

    name: str = "student"
    share: Part = 1.0
    edits: tuple[Edit, ...] = ()
    precision: PrecisionSchedule = FULLY_QUANTIZED
    routing: Routing = "through"
    labels: bool = True

    def phase(self, rest: float, terms: tuple[Term, ...], trains: tuple[Group, ...]) -> Phase:
        """The phase that it is when ``rest`` of the whole budget is the student's."""
        kept = tuple(term for term in terms if self.labels or not term.logits())
        return Phase(self.name, rest * self.share, kept, self.edits, trains, self.precision, self.routing)


@dataclass(frozen=True)
class Schedule(Checked):
    """How the student's precision moves from the first step to the last."""

    def stages(self) -> tuple[Stage, ...]:
        """The stretches, in order; the last one ends fully quantized, with the plan's bits."""
        raise NotImplementedError

    def for_plan(self, plan: Plan) -> Schedule:
        """This schedule without stages that, at the plan's bits, would repeat the last one; says what it leaves out."""
        return self

    def around(self, inner: Schedule) -> Schedule | None:
        """This schedule with ``inner`` nested in each of its stages, or None if it cannot hold it."""
        return None


@dataclass(frozen=True)
class OneStage(Schedule):
    """Everything is quantized from the first step on."""

    def stages(self) -> tuple[Stage, ...]:
        """One."""
        return (Stage(),)
