"""What happens to the teacher: frozen, absent, or trained before the student and along with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..checks import Checked
from ..distill import Group, Phase, Term


@dataclass(frozen=True)
class TeacherPolicy(Checked):
    """What happens to the teacher, before the student's phases and along with them."""

    needs_teacher: ClassVar[bool] = True

    def phases(self) -> tuple[Phase, ...]:
        """Phases that train the teacher; their shares count in the budget."""
        return ()

    def groups(self) -> tuple[Group, ...]:
        """Who is trained beside the student."""
        return ()

    def terms(self, student: tuple[Term, ...]) -> tuple[Term, ...]:
        """The loss of whom ``groups`` trains, given the student's."""
        return ()


@dataclass(frozen=True)
class NoTeacher(TeacherPolicy):
    """The student learns from labels alone."""

    needs_teacher: ClassVar[bool] = False


@dataclass(frozen=True)
class Frozen(TeacherPolicy):
    """The teacher stays as it is, in eval mode."""
