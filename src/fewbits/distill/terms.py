"""The loss terms that more than one recipe uses: each names what it reads and calls one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..anatomy import before_pooling
from ..checks import Positive, UnitInterval
from ..convert import FLOAT_BITS, plan_of
from ..quantizers import METHODS, QuantSpec, build
from ..quantizers.start import sample
from .base import NetworkName, Networks, Step, Tap, Term
from .feature_losses import Reduction, squared_error
from .logit_losses import cross_entropy, kl_divergence
from .taps import Taps


def other(network: NetworkName) -> NetworkName:
    """The network that is not ``network``."""
    return "teacher" if network == "student" else "student"


def same_shape(one: Tensor, two: Tensor, what: str) -> None:
    """Refuse to compare tensors of different shapes, which broadcasting would accept.

    Raises:
        ValueError: the shapes differ; says which.
    """
    if one.shape[1:] != two.shape[1:]:
        raise ValueError(
            f"student and teacher have different {what}: {tuple(one.shape[1:])} and {tuple(two.shape[1:])} per image; "
            "use a teacher of the same kind, or a recipe that does not compare them"
        )


def map_tap(networks: Networks, network: NetworkName) -> Tap:
    """What is pooled into the feature: the last map, N x D x H x W, or all tokens.

    Raises:
        ValueError: nothing is pooled.
    """
    model = networks.network(network)
    return Tap(network, before_pooling(model, networks.anatomy(network).head, networks.example), "output")


def teacher_grids(networks: Networks, taps: Sequence[Tap]) -> nn.ModuleList:
    """Untrained activation quantizers that put the teacher's tensors at ``taps`` on the student's kind of grid.

    Method and bits are those of the student's plan (LSQ for methods that exist at one bit only, whose signs would make
    a constant of what a ReLU gave), ranges those of the teacher's features of real images. For DoReFa this is
    Q of Zhuang et al.: clip to 0..1, then round. Reconstruction: the ranges of the other methods.

    Raises:
        ValueError: the plan leaves activations in full precision.
    """
    plan = plan_of(networks.student)
    if plan is None or plan.activations == FLOAT_BITS:
        raise ValueError(
            "quantized_teacher needs a student with quantized activations, whose bits the teacher's feature is rounded "
            "to; this one's are float"
        )
    method = plan.quantizer if len(METHODS[plan.quantizer].bits) > 1 else "lsq"
    return fitted_grids(networks, taps, method, plan.activations)


def fitted_grids(networks: Networks, taps: Sequence[Tap], method: str, bits: int) -> nn.ModuleList:
    """Untrained activation quantizers, one for each of ``taps``, set from the teacher's features of real images."""
    teacher = networks.network("teacher")
    features: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    modes = [(module, module.training) for module in teacher.modules()]
    hooks = Taps(taps, networks.student, teacher)
    try:
        with torch.no_grad():
            for images in networks.images or [networks.example]:
                teacher.eval()(images.to(networks.example.device))
                for tap, feature in hooks.collect().items():
                    features[tap].append(sample(feature.float()))
    finally:
        hooks.remove()
        for module, mode in modes:
            module.training = mode
    grids = nn.ModuleList()
    for tap in taps:
        grid = build(QuantSpec(method, bits, "activation"), 1, 1).to(networks.example.device)
        grid.calibrate(torch.cat(features[tap]))
        grids.append(grid)
    return grids.requires_grad_(False)


@dataclass(frozen=True)
class CrossEntropy(Term):
    """Cross-entropy with the true labels, which are the student's classes."""

    label_smoothing: UnitInterval = 0.0

    name: ClassVar[str] = "cross_entropy"

    def logits(self) -> tuple[NetworkName, ...]:
        """Of the network that is taught."""
        return (self.teaches,)

    def helper(self, networks: Networks) -> None:
        """None.

        Raises:
            ValueError: a teacher is taught the data's labels, but its classes are others than the student's.
        """
        if self.teaches == "teacher":
            student, teacher = _num_outputs(networks, "student"), _num_outputs(networks, "teacher")
            if student and teacher and student != teacher:
                raise ValueError(
                    f"the teacher would be trained with the student's labels, but has {teacher} outputs and the "
                    f"student {student}; pass a teacher for these classes, or use dtq, l2-sp or delta, which transfer "
                    "from other classes"
                )

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``cross_entropy``."""
        return cross_entropy(step.logits[self.teaches], step.targets, self.label_smoothing)


def _num_outputs(networks: Networks, name: NetworkName) -> int | None:
    weight = getattr(networks.network(name).get_submodule(networks.anatomy(name).head), "weight", None)
    return len(weight) if isinstance(weight, Tensor) else None  # a head of several layers does not tell


@dataclass(frozen=True)
class LogitDistance(Term):
    """KL from the other network's softened probabilities (Hinton et al., arXiv 1503.02531)."""

    temperature: Positive = 1.0

    name: ClassVar[str] = "logits"

    def logits(self) -> tuple[NetworkName, ...]:
        """Of both."""
        return ("student", "teacher")

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``kl_divergence``."""
        learner, fixed = step.logits[self.teaches], step.logits[other(self.teaches)]
        same_shape(learner, fixed, "logits")
        return kl_divergence(fixed, learner, self.temperature)


@dataclass(frozen=True)
class FeatureDistance(Term):
    """Squared error between the features that enter the two heads, or between the maps that are pooled into them."""

    reduction: Reduction = "sum"
    pooled: bool = True

    name: ClassVar[str] = "features"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """The learner's, then the other network's."""
        place = Tap.feature if self.pooled else map_tap
        return (place(networks, self.teaches), place(networks, other(self.teaches)))

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``squared_error``."""
        learner, fixed = (step.features[tap] for tap in taps)
        same_shape(learner, fixed, "features")
        return squared_error(learner, fixed, self.reduction)
