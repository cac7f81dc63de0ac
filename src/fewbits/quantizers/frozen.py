"""Min-max ranges that were frozen, with zero on a level: the affine integer grid of Jacob et al. (CVPR 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Codes, Quantizer, QuantSpec
from .learned_step import lsq
from .rounding import SMALLEST_STEP, to_codes


class FrozenMinMax(Quantizer):
    """A fixed range from ``lo <= 0`` to ``hi >= 0``, shifted by less than a step so that zero is a level.

    Forward:  clip(round(x / s), -z, 2**b - 1 - z) * s, s = (hi - lo) / (2**b - 1), z = round(-lo / s)
    Backward: 1 inside the range, 0 outside; the range is not learned

    Not the quantizer of DTQ, whose ranges change with every batch and whose zero lies between levels: another method,
    with other numbers, that engines can run on integers.

    8-bit weights lie symmetrically from -127 to 127: a smaller code would not fit into a signed byte.
    """

    paper = "Jacob et al., CVPR 2018, arXiv 1712.05877, section 2.1"
    needs_data = True

    step: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.register_buffer("step", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0.0))

    @property
    def _is_symmetric(self) -> bool:
        return self.spec.role == "weight" and self.bits == 8

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return -self.zero_point, self.num_steps - self._is_symmetric - self.zero_point

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return lsq(x, self.step, *self._bounds())

    def _encode(self, x: Tensor) -> Codes:
        low, high = self._bounds()
        codes = to_codes(x, self.step, low, high).to(torch.int32)
        return Codes(codes, self.step, torch.zeros_like(self.step), int(low), int(high))

    def _calibrate(self, x: Tensor) -> None:
        self.set_range(x.amin(), x.amax())

    @torch.no_grad()
    def set_range(self, lowest: Tensor, highest: Tensor) -> None:
        """Fix the range; zero is put into it.

        Args:
            lowest: ``lo``, 0-d.
            highest: ``hi``, 0-d.
        """
        lowest, highest = lowest.float().clamp(max=0.0), highest.float().clamp(min=0.0)
        if self._is_symmetric:
            highest = torch.maximum(-lowest, highest)
            lowest = -highest
        step = (highest - lowest) / (self.num_steps - self._is_symmetric)
        self.step.copy_(torch.where(step > SMALLEST_STEP, step, 1.0))
        self.zero_point.copy_((-lowest / self.step).round())
        self.calibrated.fill_(True)
