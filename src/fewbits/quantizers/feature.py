"""The quantizer of a teacher's output feature (QFD, Zhu et al., AAAI 2023).

Reconstruction: which uniform quantizer the paper uses is not known; this is the learned interval of EWGS with plain
straight-through rounding and an output scale, as in the public re-implementation, which knows only features behind a
ReLU.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import QuantSpec
from .ewgs import EWGSActivation
from .rounding import positive
from .start import best_range, sample


class FeatureQuantizer(EWGSActivation):
    """f_Q = o + s * round((2**b - 1) clip((f - l) / (u - l), 0, 1)) / (2**b - 1), with learned l, u and s.

    With one bit the feature is {0, s}: a threshold in the middle of [l, u]. ``s`` starts at mean|f| / mean|x_q|, so
    that the quantized feature has the float feature's size (the re-implementation starts it off that scale).

    ``o`` is fixed: 0 for features from 0 up. A feature with both signs, a transformer's behind its last norm, has to
    stay where it is, or no student could match it: there l and u start around the mean where the squared error is
    least, o = l and s = u - l (ours: with one bit the feature is mean +/- s / 2).

    Args:
        bits: 1 to 8.
    """

    offset: Tensor
    reported: ClassVar[tuple[str, ...]] = ("output_scale",)

    paper = "QFD, Zhu et al., AAAI 2023 (quantizer: reconstruction)"
    rate = 1.0  # the recipe has a factor of its own

    def __init__(self, bits: int) -> None:
        super().__init__(QuantSpec("ewgs", bits, "activation", fixed=True), 1, 1)
        self.output_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("offset", torch.tensor(0.0))
        self.delta.zero_()

    def _output(self) -> tuple[Tensor, Tensor]:
        return positive(self.output_scale.abs()) * (1.0 / self.num_steps), self.offset

    def _calibrate(self, x: Tensor) -> None:
        if bool(x.min() < 0):
            mean = float(x.mean())
            half = best_range(sample(x.reshape(-1) - mean), 0.0, self.num_steps, symmetric=True)
            self.lower.fill_(mean - half)
            self.upper.fill_(mean + half)
            self.offset.fill_(mean - half)
            self.output_scale.fill_(2 * half)
            return
        self.offset.zero_()
        super()._calibrate(x)
        self.output_scale.fill_(1.0)
        ratio = x.abs().mean() / self.fake_quantize(x).abs().mean()
        if torch.isfinite(ratio) and ratio > 0:
            self.output_scale.copy_(ratio)
