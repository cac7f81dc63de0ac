"""PACT: a learned clipping level for activations (Choi et al., arXiv 1805.06085). Its weights are DoReFa's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Codes, Quantizer, QuantSpec
from .rounding import positive, to_codes
from .start import sample
from .tiles import Out, in_tiles, indicator

PAPER_START = 8.0
START_QUANTILE = 0.999


class _ClippedRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, num_steps: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        step = alpha / num_steps
        (y,) = in_tiles(lambda v, out: (to_codes(v, step, 0, num_steps, out=out).mul_(step),), 1, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, alpha = ctx.saved_tensors
        return *_gradients(x, alpha, grads[0]), None


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        (y,) = in_tiles(lambda v, out: (torch.clamp(v, min=0.0, out=out).clamp_(max=alpha),), 1, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors
        return _gradients(x, alpha, grads[0])


def _gradients(x: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """``g * 1{0 <= x < alpha}``, and the sum of ``g * 1{x >= alpha}``."""

    def elementwise(v: Tensor, g: Tensor, out_x: Out, out_share: Out) -> tuple[Tensor, Tensor]:
        inside = indicator(torch.ge, v, 0).mul_(indicator(torch.lt, v, alpha))
        return torch.mul(g, inside, out=out_x), torch.mul(g, indicator(torch.ge, v, alpha, out_share), out=out_share)

    grad_x, share = in_tiles(elementwise, 2, x, grad)
    return grad_x, share.sum()


def pact(x: Tensor, alpha: Tensor, num_steps: int) -> Tensor:
    """Clip to [0, alpha] and round to ``num_steps`` steps (Eqs. 1 to 3 of the paper).

    Forward:  round(clip(x, 0, alpha) / step) * step, step = alpha / num_steps
    Backward: d/dx = 1 on [0, alpha); d/dalpha = 1 where x >= alpha (at x = alpha only alpha gets it)

    >>> x = torch.tensor([-1.0, 0.4, 2.0], requires_grad=True)
    >>> alpha = torch.tensor(1.5, requires_grad=True)
    >>> y = pact(x, alpha, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist(), alpha.grad.item()
    ([0.0, 0.5, 1.5], [0.0, 1.0, 0.0], 1.0)
    """
    y: Tensor = _ClippedRound.apply(x, alpha, num_steps)
    return y


class PACTActivation(Quantizer):
    """One learned clipping level ``alpha`` for a layer; an L2 penalty on it is part of the method.

    The penalty is the weight decay of ``alpha``, by default that of the weights.

    Differs from the paper: ``alpha`` starts at the 0.999 quantile of real data; ``start="paper"`` is 8.0, where almost
    everything rounds to zero at 2 bits.
    """

    paper = "PACT, Choi et al., arXiv 1805.06085"
    signed = False
    needs_data = True
    decayed = ("alpha",)
    steady = ("alpha",)

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.alpha = nn.Parameter(torch.tensor(PAPER_START))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See ``pact``."""
        return pact(x, positive(self.alpha), self.num_steps)

    def bypass(self, x: Tensor) -> Tensor:
        """Clipped to [0, alpha], not rounded."""
        y: Tensor = _Clipped.apply(x, positive(self.alpha))
        return y

    def _encode(self, x: Tensor) -> Codes:
        """Integers 0 to 2**b - 1 with scale alpha / (2**b - 1)."""
        step = positive(self.alpha) / self.num_steps
        codes = to_codes(x, step, 0, self.num_steps)
        return Codes(codes.to(torch.int32), step, torch.zeros_like(step), 0, self.num_steps)

    def _calibrate(self, x: Tensor) -> None:
        alpha = torch.tensor(PAPER_START) if self.spec.start == "paper" else torch.quantile(sample(x), START_QUANTILE)
        self.alpha.copy_(alpha if alpha > 0 else torch.tensor(1.0))
