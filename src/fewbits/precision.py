"""What is quantized right now: gates that open and close, and bit widths that change between phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from .convert import quantizers_of


@dataclass(frozen=True)
class Precision:
    """What holds at one moment of a phase; ``True`` means quantized as the plan says."""

    weights: bool = True
    activations: bool = True


class PrecisionSchedule(Protocol):
    """How precision moves within a phase."""

    def at(self, progress: float) -> Precision:
        """The precision when ``progress`` (0 to 1) of the phase is over."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same precision from the first step to the last."""

    precision: Precision = Precision()

    def at(self, progress: float) -> Precision:
        """See the class."""
        return self.precision


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Open and close the gates of all quantizers; a tensor is written in place, so nothing recompiles."""
    for _, quantizer in quantizers_of(model):
        quantizer.enabled.fill_(precision.weights if quantizer.spec.role == "weight" else precision.activations)


def set_bits(model: nn.Module, *, weights: int | None = None, activations: int | None = None) -> int:
    """Change the widths of all quantizers that the plan does not fix (it fixes the ends, the residual and its rules).

    Args:
        model: a quantized network.
        weights: new bits of weight quantizers; None leaves them.
        activations: new bits of layer input quantizers; None leaves them.

    Returns:
        How many quantizers changed; they have to be calibrated anew (``calibrate``).
    """
    changed = 0
    for _, quantizer in quantizers_of(model):
        bits = weights if quantizer.spec.role == "weight" else activations
        if bits is not None and not quantizer.spec.fixed and quantizer.bits != bits:
            quantizer.set_bits(bits)
            changed += 1
    return changed


def is_fully_quantized(model: nn.Module) -> bool:
    """Whether every gate is open."""
    return all(bool(quantizer.enabled) for _, quantizer in quantizers_of(model))
