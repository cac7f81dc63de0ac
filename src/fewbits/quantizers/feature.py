"""The quantizer of a teacher's output feature (QFD, Zhu et al., AAAI 2023).

Reconstruction: which uniform quantizer the paper uses is not known; this is the learned interval of EWGS with plain
straight-through rounding and an output scale, as in the public re-implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import QuantSpec
from .ewgs import EWGSActivation
from .rounding import positive


class FeatureQuantizer(EWGSActivation):
    """f_Q = s * round((2**b - 1) clip((f - l) / (u - l), 0, 1)) / (2**b - 1), with learned l, u and s.

    With one bit the feature is {0, s}: a threshold in the middle of [l, u]. ``s`` starts at mean|f| / mean|x_q|, so
    that the quantized feature has the float feature's size (the re-implementation starts it off that scale).

    Args:
        bits: 1 to 8.
    """

    paper = "QFD, Zhu et al., AAAI 2023 (quantizer: reconstruction)"

    def __init__(self, bits: int) -> None:
        super().__init__(QuantSpec("ewgs", bits, "activation", fixed=True), 1, 1)
        self.output_scale = nn.Parameter(torch.tensor(1.0))
        self.delta.zero_()

    def _output(self) -> tuple[Tensor, Tensor]:
        return positive(self.output_scale.abs()) * (1.0 / self.num_steps), torch.zeros_like(self.upper)

    def _calibrate(self, x: Tensor) -> None:
        super()._calibrate(x)
        self.output_scale.fill_(1.0)
        ratio = x.abs().mean() / self.fake_quantize(x).abs().mean()
        if torch.isfinite(ratio) and ratio > 0:
            self.output_scale.copy_(ratio)
