"""What is quantized right now: gates that open and close, and bit widths that change between phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from .convert import quantizers_of
from .quantizers import Quantizer

FragmentKind = Literal["block", "layer"]


@dataclass(frozen=True)
class Precision:
    """What holds at one moment of a phase; ``True`` means quantized as the plan says.

    Args:
        weights: whether weights are quantized.
        activations: whether activations are.
        probability: with which a fragment is quantized in a step; below 1 it is drawn anew for every step.
        fragment: what is drawn as one: a residual block, or a layer.
        separate: whether a fragment's weights and activations are drawn independently.
    """

    weights: bool = True
    activations: bool = True
    probability: float = 1.0
    fragment: FragmentKind = "block"
    separate: bool = True


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
        quantizer.enabled.fill_(_asked_for(quantizer, precision))


def fragments_of(model: nn.Module, blocks: Sequence[str] = (), kind: FragmentKind = "block") -> list[list[Quantizer]]:
    """The quantizers that are drawn together, in the order of the network.

    Quantizers that the plan fixes (first and last layer, residual streams, rules) are in no fragment: they stay on.

    Args:
        model: a quantized network.
        blocks: qualified names of its residual blocks (``Anatomy.blocks``); a layer outside of them is a fragment.
        kind: ``"layer"`` makes every layer a fragment.
    """
    fragments: dict[str, list[Quantizer]] = {}
    for name, quantizer in quantizers_of(model):
        if not quantizer.spec.fixed:
            block = next((b for b in blocks if name.startswith(f"{b}.")), None) if kind == "block" else None
            fragments.setdefault(block or name.rpartition(".")[0], []).append(quantizer)
    return list(fragments.values())


def draw_precision(fragments: Sequence[Sequence[Quantizer]], precision: Precision, seed: int, step: int) -> None:
    """Quantize each fragment with ``precision.probability`` (stochastic precision, Zhuang et al., TPAMI 2021, Alg. 3).

    The draw is a function of ``(seed, step)``: equal on all processes, and again after a resume.

    Args:
        fragments: from ``fragments_of``.
        precision: its ``weights`` and ``activations`` say what takes part; the rest stays off.
        seed: of the run.
        step: of the run.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    draws = torch.rand(len(fragments), 2, generator=generator) < precision.probability
    for fragment, (weights, activations) in zip(fragments, draws.tolist(), strict=True):
        for quantizer in fragment:
            drawn = weights if quantizer.spec.role == "weight" or not precision.separate else activations
            quantizer.enabled.fill_(drawn and _asked_for(quantizer, precision))


def _asked_for(quantizer: Quantizer, precision: Precision) -> bool:
    return precision.weights if quantizer.spec.role == "weight" else precision.activations


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
