"""Binary weights and activations: plain sign, XNOR-Net's scale, Bi-Real's gradient, ReActNet's threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Codes, Quantizer, QuantSpec, check_bits
from .rounding import SMALLEST_STEP, scaled_sign, sign_polynomial, sign_ste
from .tiles import indicator


class _Binary(Quantizer):
    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.set_bits(spec.bits)

    def set_bits(self, bits: int) -> None:
        """One bit is all there is.

        Raises:
            ValueError: ``bits`` is not 1.
        """
        if check_bits(bits) != 1:
            raise ValueError(
                f"bits must be 1 for the binary method {self.spec.method!r}, got {bits}; "
                "use lsq, dorefa, pact or ewgs for 2 to 8 bits"
            )

    def _scale(self, x: Tensor) -> Tensor:
        """1, or what the method multiplies the signs by; broadcasts against ``x``."""
        return torch.ones((), device=x.device)

    def _encode(self, x: Tensor) -> Codes:
        """Integers -1 and +1."""
        scale = self._scale(x)
        signs = sign_ste(self._centred(x))
        return Codes(signs.to(torch.int32), scale, torch.zeros_like(scale), -1, 1)

    def _centred(self, x: Tensor) -> Tensor:
        """``x`` minus the threshold at which the sign turns."""
        return x


def _channel_magnitude(quantizer: Quantizer, w: Tensor) -> Tensor:
    """mean|w| per output channel, detached, in a shape that broadcasts."""
    means = w.detach().abs().reshape(quantizer.num_channels, -1).mean(1).clamp(min=SMALLEST_STEP)
    return means.view(quantizer._per_channel(w))


class Sign(_Binary):
    """Plain sign with the clipped straight-through gradient, for weights and for activations.

    Forward:  +1 if x >= 0 else -1
    Backward: 1 where |x| <= 1, else 0
    """

    paper = "BinaryConnect/BNN, Hubara et al., NeurIPS 2016"

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return sign_ste(x)


class _XNORWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(w, alpha)
        return sign_ste(w) * alpha

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        w, alpha = ctx.saved_tensors
        signs, grad = sign_ste(w), grads[0]
        rest = tuple(range(1, w.ndim))
        through_mean = signs * (grad * signs).mean(rest, keepdim=True)
        return through_mean + alpha * grad * indicator(torch.le, w.abs(), 1), None


class XNORWeight(_Binary):
    """XNOR-Net weights: alpha * sign(w), alpha = mean|w| per output channel (arXiv 1603.05279, section 3.1).

    Backward: (1/n) sign(w_i) sum_j g_j sign(w_j) + alpha g_i 1{|w_i| <= 1}. The paper prints
    g_i (1/n + alpha 1{|w_i| <= 1}); this is the correction of a public re-implementation, the true
    derivative of the mean.
    """

    paper = "XNOR-Net, Rastegari et al., ECCV 2016, arXiv 1603.05279"

    def _scale(self, x: Tensor) -> Tensor:
        return _channel_magnitude(self, x)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = _XNORWeight.apply(x, self._scale(x))
        return y


class XNORActivation(_Binary):
    """XNOR-Net activations: sign(x), gradient 1{|x| < 1}. The map K of input magnitudes is left out, as is usual."""

    paper = "XNOR-Net, Rastegari et al., ECCV 2016, arXiv 1603.05279"

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return sign_ste(x, strict=True)


class BiRealWeight(_Binary):
    """Bi-Real weights: mean|w| per output channel (detached) times sign(w).

    Backward: 1 where |w| <= 1, else 0: without the scale, as in the authors' code.
    """

    paper = "Bi-Real Net, Liu et al., ECCV 2018, arXiv 1811.01335"

    def _scale(self, x: Tensor) -> Tensor:
        return _channel_magnitude(self, x)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return scaled_sign(x, self._scale(x))


class BiRealActivation(_Binary):
    """Bi-Real activations: sign(x) with the piecewise polynomial gradient, see ``sign_polynomial``."""

    paper = "Bi-Real Net, Liu et al., ECCV 2018, arXiv 1811.01335"

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return sign_polynomial(x)


class ReActActivation(_Binary):
    """ReActNet's RSign: sign(x + a_c) with a learned shift per channel, starting at 0, and Bi-Real's gradient."""

    paper = "ReActNet, Liu et al., ECCV 2020, arXiv 2003.03488"

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def _centred(self, x: Tensor) -> Tensor:
        return x + self.shift.view(self._per_channel(x))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return sign_polynomial(self._centred(x))
