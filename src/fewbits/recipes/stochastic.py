"""Stochastic precision: random blocks are quantized, more and more of them (Zhuang et al., TPAMI 2021, Algorithm 3).

Certain are blocks as fragments, independent draws for weights and activations, delta from 0.5 to 0 at half of the
training. Reconstruction: what full precision means in a fragment (the quantizer's own bypass: the raw weight, and for
DoReFa and PACT the clipped activation), and batch norm (one for all mixtures, re-estimated at the end).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..checks import Checked, Part, checked
from ..precision import FragmentKind, Precision
from .base import Recipe
from .schedule import Schedule, Stage

Delta = Annotated[Part, "the paper starts at 0.5"]
Until = Annotated[Part, "the paper ends the draws at 0.5"]


@dataclass(frozen=True)
class FallingDelta(Checked):
    """A fragment is in full precision with probability delta, which falls linearly to 0.

    Args:
        delta: at the start.
        until: progress of the phase, 0 to 1, at which everything is quantized.
        fragment: ``"block"`` or ``"layer"``.
        separate: whether weights and activations are drawn independently (the paper's W/A).
    """

    delta: Delta = 0.5
    until: Until = 0.5
    fragment: FragmentKind = "block"
    separate: bool = True

    def at(self, progress: float) -> Precision:
        """The probability of being quantized, 1 - delta."""
        delta = self.delta * max(0.0, 1 - progress / self.until)
        return Precision(probability=1 - delta, fragment=self.fragment, separate=self.separate)


@dataclass(frozen=True)
class StochasticSchedule(Schedule):
    """One stage under ``FallingDelta``."""

    delta: Delta = 0.5
    until: Until = 0.5
    fragment: FragmentKind = "block"
    separate: bool = True

    def stages(self) -> tuple[Stage, ...]:
        """One."""
        return (Stage(precision=FallingDelta(self.delta, self.until, self.fragment, self.separate)),)


@checked
def Stochastic(
    delta: Delta = 0.5, until: Until = 0.5, fragment: FragmentKind = "block", separate: bool = True
) -> Recipe:
    """Quantize random blocks in each step, all of them at last (Zhuang et al., TPAMI 2021, Algorithm 3).

    Args:
        delta: probability of full precision at the start.
        until: part of the training after which everything is quantized.
        fragment: what is drawn as one, a residual ``"block"`` or a ``"layer"``.
        separate: whether weights and activations are drawn independently.
    """
    return Recipe("stochastic", schedule=StochasticSchedule(delta, until, fragment, separate))
