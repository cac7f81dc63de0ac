"""Weights that are codes and nothing else: what a packed network holds in the place of its weight quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .base import Codes, Engine, Quantizer, QuantSpec

INFERENCE = (
    "a packed network is for inference: it holds codes, and the float weights that training moves are gone; call "
    "eval() to run it; to train on, train the network that was packed, and pack it again"
)


class PackedWeight(Quantizer):
    """Fixed codes, decoded in every forward pass; the layer's float weight is not read.

    Forward:  (codes * gain + low) * scale + offset, the very operations of ``Codes.decode``
    Backward: none

    Quantizing decoded weights again is no way to get them back: DoReFa's tanh squashes them anew, a mean of magnitudes
    is rounded, a tie turns. Codes that are kept give what the quantizer gave, bit for bit.

    Args:
        spec: of the quantizer that it replaces.
        num_channels: likewise.
        engine: likewise.
        codes: uint8, 0 to ``2**bits - 1``, in the weight's shape.
        scale: as in ``Codes``.
        offset: likewise.
        low: likewise.
        high: likewise.
    """

    paper = "that of the quantizer whose codes these are"

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        num_channels: int,
        engine: Engine,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor,
        low: int,
        high: int,
    ) -> None:
        super().__init__(spec, num_channels, 0)
        self._engine, self.low, self.high = engine, low, high
        self.gain = _gain(spec.bits, low, high)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.calibrated.fill_(True)
        self.training = False

    @classmethod
    @torch.no_grad()
    def of(cls, quantizer: Quantizer, weight: Tensor) -> Self:
        """What ``quantizer`` makes of ``weight``, on its device.

        Raises:
            ValueError: the codes do not give the quantizer's own values, bit for bit.
        """
        found = quantizer.encode(weight)
        codes = ((found.integers - found.low) // _gain(quantizer.bits, found.low, found.high)).to(torch.uint8)
        scale, offset = _shared(found.scale), _shared(found.offset)
        packed = cls(
            quantizer.spec, quantizer.num_channels, quantizer.engine, codes, scale, offset, found.low, found.high
        ).to(weight.device)
        if not torch.equal(packed.fake_quantize(weight), quantizer.fake_quantize(weight.float())):
            raise ValueError(
                f"the codes of method {quantizer.spec.method!r} do not give its values: the weight holds NaN or "
                "infinity, or encode(x).decode() differs from forward(x)"
            )
        return packed

    @property
    def engine(self) -> Engine:
        """That of the quantizer whose codes these are."""
        return self._engine

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The decoded codes, whatever ``x`` is; refused in training mode, for no optimizer moves what nothing reads."""
        if self.training:
            raise ValueError(INFERENCE)
        return self._encode(x).decode()

    def _encode(self, x: Tensor) -> Codes:
        integers = self.codes.to(torch.int32) * self.gain + self.low
        return Codes(integers, self.scale, self.offset, self.low, self.high)

    def calibrate(self, x: Tensor) -> None:
        """Refused: there is nothing left to set."""
        raise ValueError(INFERENCE)

    def set_bits(self, bits: int) -> None:
        """Refused, but for the bits that it has."""
        if bits != self.bits:
            raise ValueError(INFERENCE)

    def extra_repr(self) -> str:
        """The specification, for ``print(model)``."""
        return f"{super().extra_repr()}, packed"

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # A float state loads into any other quantized network; here its weights would be there and not be read.
        if f"{prefix}codes" not in state:
            rest[-1].append(f"{prefix.rstrip('.')}: {INFERENCE}")
        super()._load_from_state_dict(state, prefix, *rest)


def _shared(values: Tensor) -> Tensor:
    """One number for all where they are equal: most offsets are zero in every channel."""
    values = values.detach().float()
    first = values.reshape(-1)[0]
    return (first if bool((values == first).all()) else values).clone()


def _gain(bits: int, low: int, high: int) -> int:
    """Two signs, -1 and +1, are two apart; other levels are one."""
    return high - low if bits == 1 else 1
