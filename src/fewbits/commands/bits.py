"""``--weights``, ``--activations`` and whatever else a plan is made of: the same options in every command."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..convert import FLOAT_BITS, Plan
from ..runs import rules_of


@dataclass(frozen=True)
class Bits:
    """How the network is quantized.

    Args:
        weights: bits of weights, 1 to 8, or 32 for full precision.
        activations: bits of activations, 1 to 8, or 32.
        quantizer: lsq, dorefa, pact, ewgs, minmax, minmax-frozen, sign, xnor, bireal or react; by default lsq, sign at
            1/1, minmax for recipe dtq, or bireal for recipe blockwise.
        residual: bits of the quantizers around additions and pooling, or none; by default 8, for binary networks none.
        ends: bits of first and last layer: 8, 32, another width, or paper.
        keep: layers that stay float, as patterns of qualified names.
        granularity: one weight scale per tensor or per channel (lsq).
        blocks: none, or bireal for a shortcut around every 3x3 convolution, with +prelu behind the additions and
            +bottleneck, +squeeze or +grouped for a float branch beside each, and with +int8 for 8-bit shortcuts where
            the shape changes (else float); bireal+prelu+int8, for example.
    """

    weights: int = 4
    activations: int = 4
    quantizer: str | None = None
    residual: str = "auto"
    ends: str = "8"
    keep: tuple[str, ...] = ()
    granularity: str = "tensor"
    blocks: str = "none"

    def given(self) -> list[str]:
        """The options that were changed, as they are written, for whoever takes none; 32 bits ask for nothing."""
        names = [f.name for f in fields(self) if getattr(self, f.name) not in (f.default, FLOAT_BITS)]
        return [f"--{name}" for name in names]

    def plan(self, quantizer: str | None = None) -> Plan:
        """The plan that these options make.

        Args:
            quantizer: where none is chosen; None leaves it to ``Plan.of``.

        Raises:
            ValueError: an option out of its range; the message names it.
        """
        ends: Any = self.ends if self.ends == "paper" else _number(self.ends, "ends", "'paper' or a number of bits")
        residual: Any = self.residual
        if residual == "none":
            residual = None
        elif residual != "auto":
            residual = _number(residual, "residual", "'auto', 'none' or a number of bits")
        if self.granularity not in ("tensor", "channel"):
            raise ValueError(f"granularity must be tensor or channel, got {self.granularity!r}")
        rest: dict[str, Any] = {"keep": self.keep, "ends": ends, "granularity": self.granularity}
        rest["rules"] = rules_of(self.blocks)
        return Plan.of(self.weights, self.activations, self.quantizer or quantizer, residual, **rest)


def _number(text: str, name: str, allowed: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be {allowed}, got {text!r}") from None
