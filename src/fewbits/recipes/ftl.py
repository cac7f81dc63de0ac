"""FTL: feature transfer from the 32-bit twin (Du et al., ECCV 2020, doi 10.1007/978-3-030-58595-2_42).

FTL-style reconstruction from the abstract. Certain are that the continuous feature of the 32-bit branch is transferred
directly, not quantized, that the distance is the centred cosine, and that logits can be transferred as well.
Reconstruction: the taps, their side of the activation quantizer, the axes, the weight and the state of the teacher.

The student's tensor. A stage's output A is read by the next stage's first layer, which receives A_q = Q_a(A). S = A_q
is the default, so what Q_a clips gets no gradient from the transfer. With ``residual=8`` A itself is on the 8-bit grid
of the residual stream: that is what the network computes with, so ``side="input"`` means A behind the stream quantizer.
The last stage is pooled, not read by a layer: its tap is its output on either side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..anatomy import readers
from ..checks import NonNegative, Positive, checked
from ..distill import CrossEntropy, LogitDistance, Networks, Step, Tap, Term
from ..distill.base import NetworkName
from ..distill.feature_losses import Axes, Distance, feature_distance
from ..distill.terms import same_shape, teacher_grids
from .base import Recipe, names_of
from .teacher import Frozen

Parts = Literal["stages", "blocks"]
Side = Literal["input", "output"]
ChannelDim = Literal[1, -1]


@dataclass(frozen=True)
class FeatureTransfer(Term):
    """(1/L) sum over taps l of mean_i D(F^l, S^l): the twin's float features against the low-bit student's.

    Args:
        distance: D; ``"centred_cosine"`` is FTL, the others are its rivals.
        axes: what D centres and multiplies as one vector, see ``centred_cosine``.
        side: of the activation quantizer behind the tap: S is its ``"output"`` A_q or its ``"input"`` A.
        parts: which parts of the anatomy are tapped.
        names: qualified names of tapped modules, the same in both networks; empty for all ``parts``.
        quantized_teacher: whether the twin's feature is rounded first, see ``teacher_grids``: the opposite design.
        channel_dim: where the channels are, 1 for maps, -1 for tokens; for axes other than ``"sample"``.
    """

    distance: Distance = "centred_cosine"
    axes: Axes = "sample"
    side: Side = "output"
    parts: Parts = "stages"
    names: tuple[str, ...] = ()
    quantized_teacher: bool = False
    channel_dim: ChannelDim = 1

    name: ClassVar[str] = "feature_transfer"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """The student's, behind or before its activation quantizers, then the teacher's, the parts' outputs."""
        return (*self._student(networks), *self._teacher(networks))

    def helper(self, networks: Networks) -> nn.Module | None:
        """The grids of the teacher's features, if they are rounded; not trained."""
        return teacher_grids(networks, self._teacher(networks)) if self.quantized_teacher else None

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``feature_distance``."""
        half = len(taps) // 2
        grids = cast(nn.ModuleList, helper) if helper is not None else [nn.Identity()] * half
        distances = []
        for student_tap, teacher_tap, grid in zip(taps[:half], taps[half:], grids, strict=True):
            student, teacher = step.features[student_tap], step.features[teacher_tap]
            same_shape(student, teacher, f"features at {teacher_tap.module}")
            distances.append(feature_distance(student, grid(teacher), self.distance, self.axes, self.channel_dim))
        return torch.stack(distances).mean()

    def _names(self, networks: Networks, network: NetworkName) -> tuple[str, ...]:
        names = self.names or getattr(networks.anatomy(network), self.parts)
        if not names:
            raise ValueError(
                f"no {self.parts} were found in the {network}; name the modules to compare with stages=(...), or all "
                "parts with anatomy=Anatomy(...)"
            )
        return cast("tuple[str, ...]", names)

    def _teacher(self, networks: Networks) -> tuple[Tap, ...]:
        names = self._names(networks, "teacher")
        num_taps = len(self._names(networks, "student"))
        if len(names) != num_taps:
            raise ValueError(
                f"student and teacher have {num_taps} and {len(names)} {self.parts}; use the twin as teacher, or name "
                "modules that both have with stages=(...)"
            )
        return tuple(Tap("teacher", name, "output") for name in names)

    def _student(self, networks: Networks) -> tuple[Tap, ...]:
        names = self._names(networks, "student")
        behind = readers(networks.student, networks.example, names)
        bare = [name for name in names[:-1] if behind[name] is None]
        if bare and self.side == "output":
            warnings.warn(
                f"no quantized layer reads what {', '.join(bare)} give as it is (a norm stands in between, or the "
                "layer has a float input), so the transfer compares these outputs themselves",
                stacklevel=2,
            )
        return tuple(
            Tap("student", name, "output")
            if behind[name] is None
            else Tap("student", f"{behind[name]}.input_quantizer", self.side)
            for name in names
        )


@checked
def FTL(
    weight: NonNegative = 1.0,
    stages: str | Sequence[str] | None = None,
    side: Side = "output",
    axes: Axes = "sample",
    distance: Distance = "centred_cosine",
    quantized_teacher: bool = False,
    taps: Parts = "stages",
    logits: NonNegative = 0.0,
    temperature: Positive = 4.0,
    channel_dim: ChannelDim = 1,
) -> Recipe:
    """CE + weight * (1/L) sum_l mean_i D_cc(F^l, S^l) [+ logits * T^2 KL(teacher || student)].

    The rivals: plain L2, L1 and cosine by ``distance``; L2 on the quantized teacher feature by ``distance="l2",
    quantized_teacher=True``; logits transfer along with ``logits``, and alone by the recipe ``logits``. A twin that is
    trained along: ``FTL().with_options(teacher=JointTeacher())``; its ``mirror`` says whether D's gradient reaches it.

    Args:
        weight: lambda; choose from 0.1, 1, 10 on held-out data.
        stages: qualified names of the modules whose outputs are compared, in place of all that ``taps`` names.
        side: S is what the next layer's activation quantizer gives, ``"output"``, or takes, ``"input"``.
        axes: of centring and product: ``"sample"``, ``"channel"`` (of one sample) or ``"batch"`` (of one channel).
        distance: ``"centred_cosine"``, ``"cosine"``, ``"l2"`` or ``"l1"``; the last two are means over elements.
        quantized_teacher: whether the teacher's feature is rounded to the student's kind of grid first.
        taps: the outputs of all residual ``"stages"`` or of all ``"blocks"``.
        logits: mu, weight of the KL term; 0 leaves it out.
        temperature: T of the KL term.
        channel_dim: where the channels are, 1 for maps, -1 for tokens; for axes other than ``"sample"``.

    Raises:
        TypeError, ValueError: an argument of another type, out of range or unknown.
    """
    terms: tuple[Term, ...] = (
        CrossEntropy(),
        FeatureTransfer(
            weight,
            distance=distance,
            axes=axes,
            side=side,
            parts=taps,
            names=names_of(stages),
            quantized_teacher=quantized_teacher,
            channel_dim=channel_dim,
        ),
    )
    if logits:
        terms = (*terms, LogitDistance(logits, temperature=temperature))
    arm = "" if distance == "centred_cosine" else f"-{distance}"
    return Recipe(f"ftl{arm}{'-quantized' if quantized_teacher else ''}", terms, Frozen())
