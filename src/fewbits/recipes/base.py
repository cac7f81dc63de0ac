"""A recipe: terms, a teacher policy and a schedule, chosen separately; together they are phases of training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..calibration import calibrate
from ..checks import Checked, check_network, checked
from ..convert import plan_of, quantizers_of
from ..distill import CrossEntropy, Edit, Group, Networks, Objective, Phase, Term
from ..distill.base import NetworkName
from .schedule import OneStage, Schedule
from .teacher import Frozen, NoTeacher, TeacherPolicy

EXAMPLES = 2
"""Images that stay with the networks to give helpers their shapes."""


@dataclass(frozen=True)
class Recipe(Checked):
    """How a student is taught. Frozen data: prints, compares, is saved with a run.

    Args:
        name: for logs and run folders.
        terms: the student's loss.
        teacher: what happens to the teacher.
        schedule: how the student's precision moves.
        edits: changes of structure before the student's first phase.
        quantized: whether the student is a quantized network; False trains the float network itself.
    """

    name: str
    terms: tuple[Term, ...] = (CrossEntropy(),)
    teacher: TeacherPolicy = field(default_factory=NoTeacher)
    schedule: Schedule = field(default_factory=OneStage)
    edits: tuple[Edit, ...] = ()
    quantized: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fixing = [term.name for term in self.terms if term.fixes_teacher]
        if fixing and (self.teacher.phases() or self.teacher.groups()):
            raise ValueError(
                f"recipe {self.name!r} does not work: {' and '.join(fixing)} hold the student to what the source "
                "network computes, so the teacher has to stay as it is, but "
                f"{type(self.teacher).__name__} trains it; add a recipe that leaves it frozen, or take l2-sp, which "
                "remembers the source's weights"
            )

    def phases(self) -> tuple[Phase, ...]:
        """What the teacher policy needs first, then the schedule's stages with what is left of the budget."""
        before = self.teacher.phases()
        rest = 1.0 - sum(phase.share for phase in before)
        terms = (*self.terms, *self.teacher.terms(self.terms))
        trains = (Group("student"), *self.teacher.groups())
        first, *later = self.schedule.stages()
        after = (
            stage.phase(rest, terms, trains) for stage in (replace(first, edits=(*self.edits, *first.edits)), *later)
        )
        return (*before, *after)

    @property
    def has_steady_teacher(self) -> bool:
        """Whether the student's teacher stays as it is while it teaches, so that its answers can be kept."""
        return self.teacher.needs_teacher and not self.teacher.groups()

    def for_student(self, student: nn.Module) -> Recipe:
        """The same recipe without stages whose bits are not above the student's; a warning names them.

        ``fit`` trains this one; in loops of one's own, take it before ``phases``.
        """
        plan = plan_of(student)
        return self if plan is None else replace(self, schedule=self.schedule.for_plan(plan))

    @checked
    def __add__(self, other: Annotated[Recipe, "for example FTL() + Joint()"]) -> Recipe:
        """Both at once: this recipe's terms, then the other's; the schedule and the teacher of the one that has any.

        The labels count once, with this recipe's weight; so does any term that both have alike.

        Raises:
            TypeError: the other one is no recipe.
            ValueError: both bring a schedule, or both do something else with the teacher.

        >>> from fewbits.recipes import Logits, Stochastic
        >>> (Logits() + Stochastic()).name
        'logits+stochastic'
        """
        if self.quantized != other.quantized:
            raise ValueError(f"recipes {self.name!r} and {other.name!r} do not combine: one trains a float network")
        return Recipe(
            f"{self.name}+{other.name}",
            (*self.terms, *(t for t in other.terms if type(t) is not CrossEntropy and t not in self.terms)),
            _one_of("teacher", self, other, (NoTeacher(), Frozen())),
            _one_of("schedule", self, other, (OneStage(),)),
            (*self.edits, *(edit for edit in other.edits if edit not in self.edits)),
            self.quantized,
        )

    def objective(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        batches: Iterable[Any],
        phase: int = 0,
        networks: Networks | None = None,
        anatomy: Anatomy | Mapping[NetworkName, Anatomy] | None = None,
        seed: int = 0,
    ) -> Objective:
        """The objective of one phase, ready to train: structure edited, quantizers and edits set from real images.

        Args:
            student: the network that is trained, in place.
            teacher: the float network; copied if the recipe changes it (``objective.networks.teacher``).
            batches: a few batches of images, or of (images, labels), normalised.
            phase: index into ``phases()``.
            networks: of the phase before, for every phase but the first.
            anatomy: where the head, stages and blocks are, if the names of the network do not tell; one for both
                networks, or one for each by ``"student"`` and ``"teacher"``. Later phases keep it.
            seed: of what a schedule draws (stochastic precision).

        Raises:
            ValueError: a teacher is missing, a phase is asked for whose earlier ones have not run, or student and
                teacher do not fit together.
        """
        images = list(_images(batches))
        example = _example(images)
        networks = self.begin(student, teacher, example=example, phase=phase, networks=networks, anatomy=anatomy)
        device = networks.example.device
        for edit in self.phases()[phase].edits:
            edit.initialise(networks, (batch.to(device) for batch in images))
        calibrate(networks.student, images)
        networks.images = images
        try:
            return Objective(networks, self.phases()[phase], seed)
        finally:
            networks.images = []

    def begin(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        example: Tensor,
        phase: int,
        networks: Networks | None,
        anatomy: Anatomy | Mapping[NetworkName, Anatomy] | None = None,
    ) -> Networks:
        """The networks with the structure of ``phase``; values are set by ``objective``, or loaded on resume."""
        phases = self.phases()
        if not 0 <= phase < len(phases):
            raise ValueError(f"phase must be 0..{len(phases) - 1} for recipe {self.name!r}, got {phase}")
        if networks is None:
            networks = self._start(student, teacher, example, anatomy)
        elif student is not networks.student:
            raise ValueError("student is another object than networks.student; each phase trains on the same one")
        if networks.num_phases != phase:
            raise ValueError(
                f"phase {phase} of recipe {self.name!r} needs the networks of phase {phase - 1}, but "
                f"{networks.num_phases} phases have run; pass networks=objective.networks of the phase before"
            )
        for edit in phases[phase].edits:
            edit.apply(networks)
        networks.num_phases = phase + 1
        return networks

    def restructure(self, student: nn.Module) -> nn.Module:
        """Give a fresh ``student`` the structure that the last phase left it with; values are loaded afterwards.

        Args:
            student: as it was before the first phase, in place; or the float network that it came from.
        """
        networks = Networks(student, None, torch.empty(0))
        for edit in (edit for phase in self.phases() for edit in phase.edits if edit.reshapes == "student"):
            edit.apply(networks)
        return student

    def _start(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        example: Tensor,
        anatomy: Anatomy | Mapping[NetworkName, Anatomy] | None,
    ) -> Networks:
        check_network("student", student)
        if teacher is not None:
            check_network("teacher", teacher)
        is_quantized = any(True for _ in quantizers_of(student))
        if self.quantized and not is_quantized:
            raise ValueError(
                f"recipe {self.name!r} trains a quantized student; call fewbits.quantize(model, ...) first"
            )
        if not self.quantized and is_quantized:
            raise ValueError(f"recipe {self.name!r} trains the float network itself, got a quantized one")
        if self.teacher.needs_teacher and teacher is None:
            raise ValueError(
                f"recipe {self.name!r} needs a teacher; pass teacher=..., for example the float network that the "
                "student came from (train one with recipe 'float')"
            )
        if teacher is student:
            raise ValueError("teacher and student are the same object; quantize() returns a copy to train")
        if not self.teacher.needs_teacher:
            teacher = None
        device = next(student.parameters()).device
        source = teacher = None if teacher is None else teacher.to(device)
        if teacher is not None and any(phase.edits or phase.trains != (Group("student"),) for phase in self.phases()):
            teacher = copy.deepcopy(teacher)
            if not any(parameter.requires_grad for parameter in teacher.parameters()):
                # Many people freeze a teacher by hand; the phases decide about this copy.
                teacher.requires_grad_(True)
        if isinstance(anatomy, Anatomy):
            anatomy = {"student": anatomy} if teacher is None else {"student": anatomy, "teacher": anatomy}
        return Networks(student, teacher, example.to(device), anatomy, source)

    def with_options(self, **options: Any) -> Recipe:
        """The same recipe with other fields."""
        return replace(self, **options)


def names_of(modules: str | Sequence[str] | None) -> tuple[str, ...]:
    """Qualified names as an option gives them: one, several (also in one text, with commas) or none.

    >>> names_of("layer1,layer2"), names_of(None)
    (('layer1', 'layer2'), ())
    """
    return tuple(map(str.strip, modules.split(","))) if isinstance(modules, str) else tuple(modules or ())


def _one_of(part: str, one: Recipe, two: Recipe, plain: tuple[Any, ...]) -> Any:
    """The ``part`` of ``one`` or ``two``; anything wins over ``plain`` ones, a later of them over an earlier."""
    mine, theirs = getattr(one, part), getattr(two, part)
    if mine in plain and theirs in plain:
        return max(mine, theirs, key=plain.index)
    if mine in plain or theirs in plain or mine == theirs:
        return theirs if mine in plain else mine
    for outer, inner in ((mine, theirs), (theirs, mine)):
        if isinstance(outer, Schedule) and (nested := outer.around(inner)) is not None:
            return nested
    raise ValueError(
        f"recipes {one.name!r} and {two.name!r} do not combine: both bring their own {part} "
        f"({type(mine).__name__}, {type(theirs).__name__}); take one of them"
    )


def _images(batches: Iterable[Any]) -> Iterator[Tensor]:
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise TypeError(
                "batches must hold images N x C x H x W, or (images, labels); "
                f"got {type(images).__name__}{f' of shape {tuple(images.shape)}' if isinstance(images, Tensor) else ''}"
            )
        yield images


def _example(images: list[Tensor]) -> Tensor:
    if not images or len(images[0]) == 0:
        raise ValueError("batches holds no image; pass a few real batches, they set the quantizers' ranges")
    return torch.as_tensor(images[0][:EXAMPLES]).clone()
