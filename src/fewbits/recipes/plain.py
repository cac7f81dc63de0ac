"""The two recipes without a teacher: float training, and plain quantization-aware training, everyone's baseline."""

from __future__ import annotations

from ..checks import UnitInterval, checked
from ..distill import CrossEntropy
from .base import Recipe


@checked
def Float(label_smoothing: UnitInterval = 0.0) -> Recipe:
    """Train the full-precision network itself, from random weights."""
    return Recipe("float", (CrossEntropy(label_smoothing=label_smoothing),), quantized=False)


@checked
def Plain(label_smoothing: UnitInterval = 0.0) -> Recipe:
    """Quantization-aware training on the labels alone: the baseline that every other recipe is judged against."""
    return Recipe("plain", (CrossEntropy(label_smoothing=label_smoothing),))
