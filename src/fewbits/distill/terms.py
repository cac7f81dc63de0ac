"""The loss terms that more than one recipe uses: each names what it reads and calls one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .base import NetworkName, Networks, Step, Tap, Term
from .feature_losses import Reduction, squared_error
from .logit_losses import cross_entropy, kl_divergence


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


@dataclass(frozen=True)
class CrossEntropy(Term):
    """Cross-entropy with the true labels."""

    label_smoothing: float = 0.0

    name: ClassVar[str] = "cross_entropy"

    def logits(self) -> tuple[NetworkName, ...]:
        """Of the network that is taught."""
        return (self.teaches,)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``cross_entropy``."""
        return cross_entropy(step.logits[self.teaches], step.targets, self.label_smoothing)


@dataclass(frozen=True)
class LogitDistance(Term):
    """KL from the other network's softened probabilities (Hinton et al., arXiv 1503.02531)."""

    temperature: float = 1.0

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
    """Squared error between the features that enter the two heads."""

    reduction: Reduction = "sum"

    name: ClassVar[str] = "features"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """What enters the learner's head, then the other network's."""
        return (Tap.feature(networks, self.teaches), Tap.feature(networks, other(self.teaches)))

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``squared_error``."""
        learner, fixed = (step.features[tap] for tap in taps)
        same_shape(learner, fixed, "features")
        return squared_error(learner, fixed, self.reduction)
