"""Layers that hold their quantizers: the float layer, with one quantizer on its weight and one on its input."""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantizers import Quantizer, QuantSpec, build
from .quantizers.again import keeping_input
from .quantizers.ewgs import EWGSWeight


class QuantLayer(nn.Module):
    """What a quantized convolution and a quantized linear layer share.

    ``weight`` and ``bias`` keep the float layer's names, so that its ``state_dict`` loads as it is.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    quantized_weight: Tensor | None = None
    """The quantized weight, where a step has made it already for several micro-batches."""

    @classmethod
    def from_float(cls, layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> Self:
        """Turn ``layer`` into a quantized one, in place.

        The object stays the same and changes its class: whoever shares it, hooks it or ties its weight keeps doing so.

        Args:
            layer: an ``nn.Conv2d`` or an ``nn.Linear``.
            weight: how its weight is quantized; None leaves it in full precision.
            activation: how its input is quantized; None likewise.
        """
        layer.__class__ = cls
        quantized = cast(Self, layer)
        channel_dim, num_inputs = quantized._input_channels()
        quantized.weight_quantizer = build(weight, quantized.weight.shape[0], 0) if weight else None
        quantized.input_quantizer = build(activation, num_inputs, channel_dim) if activation else None
        return quantized

    def _input_channels(self) -> tuple[int, int]:
        """Where the input's channels are, and how many there are."""
        raise NotImplementedError

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float layer's own computation with another weight."""
        raise NotImplementedError

    def _reads_at_once(self) -> bool:
        """Whether nothing, padding say, comes between the quantized input and the layer's operator."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """The float layer on the quantized input and weight; shapes as in the float layer."""
        if self.input_quantizer is not None:
            x = keeping_input(self.input_quantizer, x, is_cast=self._reads_at_once())
        return self._apply_weight(x, self._weight())

    def _weight(self) -> Tensor:
        if self.weight_quantizer is None:
            return self.weight
        if self.quantized_weight is not None:
            return self.quantized_weight
        return keeping_input(self.weight_quantizer, self.weight, is_cast=True)

    @torch.no_grad()
    def calibrate_weight(self) -> None:
        """Set the weight quantizer's range, if it has one, from the weight."""
        if self.weight_quantizer is not None:
            self.weight_quantizer.calibrate(self.weight)

    @torch.no_grad()
    def match_output(self, x: Tensor) -> None:
        """Start EWGS's output scale: mean|float output| / mean|quantized output| on a real input ``x``."""
        quantizer = self.weight_quantizer
        if not isinstance(quantizer, EWGSWeight):
            return
        quantizer.output_scale.fill_(1.0)
        wanted = self._without_bias(x, self.weight)
        x = x if self.input_quantizer is None else self.input_quantizer.fake_quantize(x)
        got = self._without_bias(x, quantizer.fake_quantize(self.weight))
        ratio = wanted.abs().mean() / got.abs().mean()
        quantizer.output_scale.copy_(ratio if torch.isfinite(ratio) and ratio > 0 else torch.ones_like(ratio))

    def _without_bias(self, x: Tensor, weight: Tensor) -> Tensor:
        output = self._apply_weight(x, weight)
        if self.bias is None:
            return output
        return output - (self.bias.view(-1, 1, 1) if self._input_channels()[0] == 1 else self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """``nn.Conv2d`` with quantizers: groups, dilation, stride and padding modes as they were.

    The input is quantized before it is padded: zero padding stays exactly zero, also for grids without a zero level.
    """

    def _input_channels(self) -> tuple[int, int]:
        return 1, self.in_channels

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)

    def _reads_at_once(self) -> bool:
        return self.padding_mode == "zeros"


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]  # Linear says bias: Tensor, and may hold None
    """``nn.Linear`` with quantizers, on any number of leading dimensions."""

    def _input_channels(self) -> tuple[int, int]:
        return -1, self.in_features

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


QUANTIZED: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
"""Which float layer becomes which quantized one."""
