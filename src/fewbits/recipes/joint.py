"""Joint distillation: the teacher is trained along (Zhuang et al., TPAMI 2021, Eqs. 6 to 9; CVPR 2018).

Certain are the objectives of both sides, their weights, the quantized teacher feature, and that each side is a constant
to the other. Reconstruction: how L_att is normalised, that its gradient stops at the other network, that the taps are
the last two stages, and, for students without DoReFa's range 0..1, the grid that the teacher's feature is rounded to.

Student and teacher step once, on one backward pass: their losses share no parameter, and each sees the other's output
from before the update, so this is the authors' order of updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..checks import Bits, NonNegative, Positive, PositiveInt, checked
from ..convert import FLOAT_BITS, plan_of
from ..distill import CrossEntropy, Group, LogitDistance, Networks, Step, Tap, Term
from ..distill.base import NetworkName
from ..distill.feature_losses import AttentionForm, attention_map_distance, squared_error
from ..distill.terms import fitted_grids, same_shape
from .base import Recipe
from .teacher import Frozen, TeacherPolicy

Grid = Literal["data", "unit"]


@dataclass(frozen=True)
class JointTeacher(TeacherPolicy):
    """The teacher learns too: the labels, and what the student's terms compare, from its own side.

    Args:
        lr: factor on the run's learning rate (the paper: 0.001 against the student's 0.005).
        labels: weight of the teacher's cross-entropy, a1.
        mirror: whether the student's other terms, those that have another side, teach the teacher as well; False
            leaves it the labels alone.
    """

    lr: NonNegative = 0.2
    labels: NonNegative = 1.0
    mirror: bool = True

    def groups(self) -> tuple[Group, ...]:
        """The teacher, at its own rate."""
        return (Group("teacher", self.lr),)

    def terms(self, student: tuple[Term, ...]) -> tuple[Term, ...]:
        """Cross-entropy, and the student's terms the other way round: in each, the student is the constant."""
        two_sided = (t for t in student if t.mirrors and not isinstance(t, CrossEntropy))
        mirrored = (replace(t, teaches="teacher") for t in two_sided if self.mirror)
        return (CrossEntropy(self.labels, teaches="teacher"), *mirrored)


@dataclass(frozen=True)
class QuantizedMaps(Term):
    """A distance between the student's feature maps and the teacher's quantized ones, Q(mu), at the last stages.

    Args:
        stages: how many of the last stages are compared.
        bits: of Q; None takes the student's activation bits, 32 leaves the feature as it is.
        grid: of Q: ``"unit"`` clips to 0..1 (authors' code, for DoReFa); ``"data"`` is an LSQ grid that fits the
            teacher's features at the start (reconstruction).
    """

    stages: PositiveInt = 2
    bits: Bits | Literal[32] | None = None
    grid: Grid = "data"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """The outputs of the last stages: the student's, then the teacher's."""
        return (*self._of(networks, "student"), *self._of(networks, "teacher"))

    def _of(self, networks: Networks, name: NetworkName) -> tuple[Tap, ...]:
        stages = networks.anatomy(name).stages
        if len(stages) < self.stages:
            raise ValueError(
                f"stages must be at most {len(stages)}, the stages found in the {name}, got {self.stages}; "
                "name them with anatomy=Anatomy(stages=..., blocks=..., head=...)"
            )
        return tuple(Tap(name, stage, "output") for stage in stages[-self.stages :])

    def helper(self, networks: Networks) -> nn.Module | None:
        """One quantizer for each of the teacher's features, set from real images; none of it is trained."""
        plan = plan_of(networks.student)
        bits = self.bits or (plan.activations if plan else FLOAT_BITS)
        if bits == FLOAT_BITS:
            return None
        return fitted_grids(networks, self._of(networks, "teacher"), "lsq" if self.grid == "data" else "dorefa", bits)

    def pairs(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
        """(nu, Q(mu)) at each tap."""
        students, teachers = taps[: self.stages], taps[self.stages :]
        quantizers = cast(nn.ModuleList, helper) if helper is not None else [nn.Identity()] * self.stages
        pairs = []
        for student, teacher, quantizer in zip(students, teachers, quantizers, strict=True):
            same_shape(step.features[student], step.features[teacher], "stage outputs")
            pairs.append((step.features[student], quantizer(step.features[teacher])))
        return pairs


@dataclass(frozen=True)
class AttentionTransfer(QuantizedMaps):
    """L_att (Eq. 7), summed over taps: normalised attention maps, A = sum over channels of |feature|."""

    weight: NonNegative = 50.0
    form: AttentionForm = "mean_squared"

    name: ClassVar[str] = "attention"

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``attention_map_distance``."""
        pairs = self.pairs(step, taps, helper)
        return torch.stack([attention_map_distance(nu, mu, self.form) for nu, mu in pairs]).sum()


@dataclass(frozen=True)
class Hint(QuantizedMaps):
    """R = 1/2 ||Q(mu) - nu||^2 (CVPR 2018 Eq. 5), mean over elements (authors' code), summed over taps."""

    weight: NonNegative = 0.1

    name: ClassVar[str] = "hint"

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``squared_error``."""
        return 0.5 * torch.stack([squared_error(nu, mu, "mean") for nu, mu in self.pairs(step, taps, helper)]).sum()


@checked
def Joint(
    labels: NonNegative = 0.5,
    beta: NonNegative = 0.5,
    gamma: NonNegative | None = None,
    feature: Literal["attention", "hint", "none"] = "attention",
    bits: Bits | Literal[32] | None = None,
    grid: Grid = "data",
    stages: PositiveInt = 2,
    form: AttentionForm = "mean_squared",
    temperature: Positive = 1.0,
    teacher_lr: NonNegative = 0.2,
    train_teacher: bool = True,
) -> Recipe:
    """Student: labels * CE + beta * KL(teacher || student) + gamma * L_att; the teacher likewise, with CE in full.

    Args:
        labels: weight of the student's cross-entropy, a2.
        beta: of the KL, in both directions.
        gamma: of the feature term; None is the papers' own, 50 for attention maps (v3) and 0.1 for the hint (v1).
        feature: what is compared at the last stages: attention maps (TPAMI), the feature itself (CVPR), or nothing.
        bits: of the teacher's feature, see ``QuantizedMaps``; 32 leaves it continuous.
        grid: of the teacher's feature, ``"data"`` or ``"unit"``.
        stages: how many of the last stages are compared.
        form: of L_att, see ``attention_map_distance``.
        temperature: of the KL.
        teacher_lr: factor on the run's learning rate.
        train_teacher: False freezes the teacher: the paper's ablation.

    Raises:
        TypeError, ValueError: an argument of another type, out of range or unknown.
    """
    maps: dict[str, tuple[QuantizedMaps, ...]] = {
        "attention": (AttentionTransfer(stages=stages, bits=bits, grid=grid, form=form),),
        "hint": (Hint(stages=stages, bits=bits, grid=grid),),
        "none": (),
    }
    chosen = (term if gamma is None else replace(term, weight=gamma) for term in maps[feature])
    terms = (CrossEntropy(labels), LogitDistance(beta, temperature=temperature), *chosen)
    return Recipe("joint", terms, JointTeacher(teacher_lr) if train_teacher else Frozen())
