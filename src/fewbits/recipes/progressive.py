"""Progressive quantization: two stages, and bits from high to low (Zhuang et al., TPAMI 2021, Algorithms 1 and 2).

Certain are the order of the stages, that each starts from the solution before it, and the experiments' widths 8, 4, 2.
Reconstruction: that a stage starts from the latent weights of the one before, and how the two nest in each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..checks import Bits, Inside, checked
from ..convert import FLOAT_BITS, Plan, plan_of, quantizers_of
from ..distill import Edit, Networks
from ..layers import QuantLayer
from ..precision import Fixed, Precision, set_bits
from .base import Recipe
from .schedule import OneStage, Schedule, Stage

Widths = Annotated[tuple[Bits, ...], "they fall from stage to stage, for example (8, 4)"]
Nesting = Literal["stages", "precisions"]
Start = Literal["latent", "quantized"]
FirstShare = Annotated[Inside, "it is the first stage's part"]
WEIGHTS_ONLY = Fixed(Precision(activations=False))


@dataclass(frozen=True)
class SetBits(Edit):
    """Change the student's widths; quantizers that changed are calibrated anew.

    Args:
        weights: bits of weights, never below the plan's; None is the plan's own width.
        activations: bits of layer inputs, likewise.
    """

    weights: Bits | None = None
    activations: Bits | None = None

    def apply(self, networks: Networks) -> None:
        """See the class."""
        plan = plan_of(networks.student)
        if plan is None:
            raise ValueError("a schedule of bits ends at the plan's, but the student has none; make it with quantize()")
        for role, planned, bits in (
            ("weight", plan.weights, self.weights),
            ("activation", plan.activations, self.activations),
        ):
            if planned != FLOAT_BITS:
                set_bits(networks.student, **{f"{role}s": max(planned, bits or planned)})


@dataclass(frozen=True)
class JoinActivations(Edit):
    """Let activation quantizers join a network whose weights were trained: what it computes sets their ranges."""

    def apply(self, networks: Networks) -> None:
        """Nothing: no structure changes."""

    def initialise(self, networks: Networks, batches: Iterable[Tensor]) -> None:
        """Mark those that were off as not calibrated; the objective calibrates what is marked."""
        for _, quantizer in quantizers_of(networks.student):
            if quantizer.spec.role == "activation" and not bool(quantizer.enabled):
                quantizer.calibrated.fill_(False)


@dataclass(frozen=True)
class StartFromQuantized(Edit):
    """Round the latent weights to their grid (a public re-implementation's reading of two stages)."""

    def apply(self, networks: Networks) -> None:
        """Nothing: no structure changes."""

    @torch.no_grad()
    def initialise(self, networks: Networks, batches: Iterable[Tensor]) -> None:
        """Replace each weight by its quantized value."""
        for layer in networks.student.modules():
            if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
                layer.weight.copy_(layer.weight_quantizer.fake_quantize(layer.weight))


@dataclass(frozen=True)
class ProgressiveSchedule(Schedule):
    """Weights and activations together, from high bits to low (Algorithm 2); each width has an equal part.

    Args:
        bits: widths before the plan's own, falling.
    """

    bits: Widths = (8, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_falling(self.bits)

    def for_plan(self, plan: Plan) -> Schedule:
        """With the widths above the plan's: the others are the last stage itself."""
        return replace(self, bits=_above(self.bits, plan))

    def stages(self) -> tuple[Stage, ...]:
        """One for each width; the last is the plan's."""
        share = 1 / (len(self.bits) + 1)
        before = (Stage(f"{bits} bits", share, (SetBits(bits, bits),)) for bits in self.bits)
        return (*before, Stage("student", share, (SetBits(),)))


@dataclass(frozen=True)
class TwoStageSchedule(Schedule):
    """Weights first, then activations as well (Algorithm 1).

    Args:
        bits: widths that each stage passes on its way to the plan's: progressive precision nested in the stages.
        nesting: reconstruction: ``"stages"`` lets weights fall through all widths, then activations;
            ``"precisions"`` runs both stages at each width.
        start: of the second stage: from the ``"latent"`` weights (reconstruction) or the ``"quantized"`` ones.
        share: of the first stage in the student's budget.
    """

    bits: Widths = ()
    nesting: Nesting = "stages"
    start: Start = "latent"
    share: FirstShare = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_falling(self.bits)

    def stages(self) -> tuple[Stage, ...]:
        """Weights at each width, then activations at each width; or both stages at each width."""
        widths = (*self.bits, None)  # None: the plan's own
        first, second = self.share / len(widths), (1 - self.share) / len(widths)
        join = (*((StartFromQuantized(),) if self.start == "quantized" else ()), JoinActivations())
        if self.nesting == "stages":
            weights = (Stage(_name("weights", b), first, (SetBits(b),), WEIGHTS_ONLY) for b in widths)
            activations = (
                # They join once, at the first of their widths.
                Stage(_name("activations", b), second, (SetBits(None, b), *(join if b is widths[0] else ())))
                for b in widths
            )
            return (*weights, *activations)
        pairs = (
            (
                Stage(_name("weights", b), first, (SetBits(b, b),), WEIGHTS_ONLY),
                Stage(_name("activations", b), second, (SetBits(b, b), *join)),
            )
            for b in widths
        )
        return tuple(stage for pair in pairs for stage in pair)

    def for_plan(self, plan: Plan) -> Schedule:
        """With the widths above the plan's, of weights or of activations; a warning where one side repeats stages."""
        bits = _above(self.bits, plan)
        again = [str(b) for b in bits if b <= max(plan.weights, plan.activations)]
        if again and self.nesting == "stages":
            warnings.warn(
                f"bits {', '.join(again)} are above the student's for weights or for activations only ({plan.weights} "
                f"and {plan.activations}): stages of the other side repeat each other; use nesting 'precisions', or "
                "leave these bits out",
                stacklevel=3,
            )
        return replace(self, bits=bits)

    def around(self, inner: Schedule) -> Schedule | None:
        """With progressive widths in each stage."""
        return replace(self, bits=inner.bits) if isinstance(inner, ProgressiveSchedule) and not self.bits else None


def _name(what: str, bits: int | None) -> str:
    return what if bits is None else f"{what}, {bits} bits"


def _above(bits: tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    """The ``bits`` that are above the plan's for weights or activations; a warning names the others."""
    least = min(plan.weights, plan.activations)
    kept = tuple(b for b in bits if b > least)
    if kept != bits:
        warnings.warn(
            f"bits {', '.join(str(b) for b in bits if b <= least)} are not above the student's, {plan.weights} for "
            f"weights and {plan.activations} for activations: such stages would repeat the last one and are left out"
            + ("" if kept else ", so no bits fall at all; quantize to fewer bits, or start from more"),
            stacklevel=4,
        )
    return kept


def _check_falling(bits: tuple[int, ...]) -> None:
    if list(bits) != sorted(set(bits), reverse=True):
        raise ValueError(f"bits must fall from stage to stage, got {bits}; for example (8, 4)")


@checked
def TwoStage(
    bits: Widths = (),
    nesting: Nesting = "stages",
    start: Start = "latent",
    share: FirstShare = 0.5,
) -> Recipe:
    """Quantize the weights, train, then the activations as well (Zhuang et al., TPAMI 2021, Algorithm 1).

    Args:
        bits: widths on the way to the plan's, such as (8, 4); empty goes there at once.
        nesting: how widths and stages nest, see ``TwoStageSchedule``.
        start: of the second stage, ``"latent"`` or ``"quantized"`` weights.
        share: of the first stage in the budget.
    """
    return Recipe("two-stage", schedule=TwoStageSchedule(bits, nesting, start, share))


@checked
def Progressive(bits: Widths = (8, 4)) -> Recipe:
    """Train at high bits, then at lower ones, each from the solution before (Zhuang et al., TPAMI 2021, Algorithm 2).

    Args:
        bits: widths before the plan's own; (8, 4) and a plan of 2 bits are the paper's 8, 4, 2. ``fit`` leaves out
            those that are not above the plan's.
    """
    return Recipe("progressive", schedule=ProgressiveSchedule(bits) if bits else OneStage())
