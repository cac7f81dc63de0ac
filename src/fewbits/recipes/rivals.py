"""The rivals that every distillation method has to be compared with: float logits and float features."""

from __future__ import annotations

from ..checks import NonNegative, Positive, checked
from ..distill import CrossEntropy, FeatureDistance, LogitDistance
from ..distill.feature_losses import Reduction
from .base import Recipe
from .teacher import Frozen


@checked
def Logits(weight: NonNegative = 0.5, temperature: Positive = 4.0, labels: NonNegative = 0.5) -> Recipe:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531): labels * CE + weight * T^2 KL(teacher || student).

    Args:
        weight: of the KL term.
        temperature: T.
        labels: weight of the cross-entropy with the true labels.
    """
    return Recipe("logits", (CrossEntropy(labels), LogitDistance(weight, temperature=temperature)), Frozen())


@checked
def Features(weight: NonNegative = 0.5, reduction: Reduction = "sum", pooled: bool = True) -> Recipe:
    """Float-feature distillation: CE + weight * ||f_s - f_t||^2 on the vectors that enter the heads.

    Args:
        weight: of the feature term.
        reduction: over the feature's elements, ``"sum"`` or ``"mean"``; the mean over the batch in both cases.
        pooled: False compares the maps that are pooled into these vectors; their sum has H x W times the elements.
    """
    return Recipe("features", (CrossEntropy(), FeatureDistance(weight, reduction=reduction, pooled=pooled)), Frozen())
