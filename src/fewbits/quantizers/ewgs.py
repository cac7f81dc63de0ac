"""EWGS: element-wise gradient scaling with a learned interval (Lee et al., CVPR 2021, arXiv 2104.00903)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Codes, Engine, Quantizer, QuantSpec
from .rounding import codes_above, positive
from .start import best_range, sample
from .tiles import Out, in_tiles, indicator

DELTA = 1e-3
"""The fixed scaling factor of the authors' scripts; the Hessian form needs a double backward."""


class _LearnedInterval(torch.autograd.Function):
    """Saves the input alone and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lower: Tensor, width: Tensor, scale: Tensor, offset: Tensor, delta: Tensor, num_steps: int
    ) -> Tensor:
        ctx.save_for_backward(x, lower, width, scale, delta)
        ctx.num_steps = num_steps
        step = width / num_steps
        (y,) = in_tiles(
            lambda v, out: (codes_above(v, lower, step, num_steps, out=out).mul_(scale).add_(offset),), 1, x
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lower, width, scale, delta = ctx.saved_tensors
        grad, num_steps = grads[0], ctx.num_steps
        step = width / num_steps

        def gradients(v: Tensor, g: Tensor, out_x: Out, out_share: Out) -> tuple[Tensor, Tensor]:
            unit = torch.sub(v, lower).div_(width)
            clipped = unit.clamp(0.0, 1.0)
            inside = indicator(torch.eq, unit, clipped)
            error = clipped.sub_(codes_above(v, lower, step, num_steps).div_(num_steps))
            g = torch.mul(g, scale).mul_(num_steps)
            factor = g.sign().mul_(delta).mul_(error).add_(1)
            grad_x = torch.mul(g, factor, out=out_x).mul_(inside).div_(width)
            return grad_x, torch.mul(grad_x, unit, out=out_share)

        def scale_share(v: Tensor, g: Tensor, out: Out) -> tuple[Tensor]:
            return (codes_above(v, lower, step, num_steps, out=out).mul_(g),)

        # unit = (x - lower) / width with width = upper - lower: d/dwidth at a fixed lower end is -unit / width,
        # and lower's share through the width is added by the caller's graph.
        grad_x, width_share = in_tiles(gradients, 2, x, grad)
        grad_scale = in_tiles(scale_share, 1, x, grad)[0].sum() if ctx.needs_input_grad[3] else None
        grad_offset = grad.sum() if ctx.needs_input_grad[4] else None
        return grad_x, -grad_x.sum(), -width_share.sum(), grad_scale, grad_offset, None, None


def ewgs(
    x: Tensor, lower: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, delta: Tensor, num_steps: int
) -> Tensor:
    """Quantize in a learned interval, with element-wise gradient scaling (Eqs. 1, 2 and 7 of the paper).

    Forward:  scale * round(clip((x - l) / (u - l), 0, 1) * num_steps) + offset, the step (u - l) / num_steps computed
              first
    Backward: the gradient g of the rounded value becomes g * (1 + delta * sign(g) * (x_n - x_q)); clip, l and u are
              differentiated truly, so that clipped elements move neither l nor u; scale and offset as written

    Args:
        x: values, any shape, float32.
        lower: ``l``, 0-d as all that follow.
        upper: ``u``.
        scale: between neighbouring values.
        offset: the smallest value.
        delta: from 0, which is straight through.
        num_steps: 2**bits - 1.

    >>> x = torch.tensor([-1.0, 0.4, 2.0], requires_grad=True)
    >>> lower, upper, scale = (torch.tensor(v, requires_grad=True) for v in (0.0, 1.5, 0.5))
    >>> y = ewgs(x, lower, upper, scale, torch.tensor(0.0), torch.tensor(0.0), 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist(), scale.grad.item()
    ([0.0, 0.5, 1.5], [0.0, 1.0, 0.0], 4.0)
    """
    y: Tensor = _LearnedInterval.apply(x, lower, positive(upper - lower), scale, offset, delta, num_steps)
    return y


class _EWGS(Quantizer):
    paper = "EWGS, Lee et al., CVPR 2021, arXiv 2104.00903"
    needs_data = True
    rate = 0.01
    """Adam 1e-5 beside 1e-3 for the weights in the paper; at the weights' own rate the interval runs away."""
    delta: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.lower = nn.Parameter(torch.tensor(-1.0 if spec.role == "weight" else 0.0))
        self.upper = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("delta", torch.tensor(DELTA))

    def _output(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See ``ewgs``."""
        return ewgs(x, self.lower, self.upper, *self._output(), self.delta, self.num_steps)

    def _encode(self, x: Tensor) -> Codes:
        """Integers 0 to 2**b - 1 of the learned interval."""
        scale, offset = self._output()
        codes = codes_above(x, self.lower, positive(self.upper - self.lower) / self.num_steps, self.num_steps)
        return Codes(codes.to(torch.int32), scale, offset, 0, self.num_steps)


class EWGSWeight(_EWGS):
    """Weights on [-1, 1] times the layer's learned output scale ``|s|``; no zero level.

    The paper multiplies the layer's output by ``|s|``; a convolution is linear, so the factor sits on the weights here,
    which is the same number and the same gradient. ``s`` starts from the layer's output, see ``QuantLayer``.

    Differs from the paper: the interval starts where the squared error is least; ``start="paper"`` is 3 std(w).
    """

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.output_scale = nn.Parameter(torch.tensor(1.0))

    @property
    def engine(self) -> Engine:
        """Codes ``2q - (2**b - 1)`` are whole numbers around zero; at 8 bits they need nine and stay float."""
        return "shifted" if self.bits < 8 else "float"

    def _output(self) -> tuple[Tensor, Tensor]:
        magnitude = positive(self.output_scale.abs())
        return magnitude * (2.0 / self.num_steps), -magnitude

    def _calibrate(self, x: Tensor) -> None:
        flat = x.reshape(-1)
        if self.spec.start == "paper":
            upper = 3 * float(flat.std()) if flat.numel() > 1 else 0.0
        else:
            upper = best_range(sample(flat), 0.0, self.num_steps, symmetric=True)
        upper = upper if upper > 0 else 1.0
        self.upper.fill_(upper)
        self.lower.fill_(-upper)


class EWGSActivation(_EWGS):
    """Activations mapped from the learned interval [l, u] to [0, 1].

    Differs from the paper: ``u`` starts where the squared error is least, ``l`` at the minimum;
    ``start="paper"`` is u = 3 std(x) / sqrt(1 - 2/pi).
    """

    @property
    def engine(self) -> Engine:
        """The input is shifted by ``l`` before it is divided."""
        return "transformed"

    def _output(self) -> tuple[Tensor, Tensor]:
        return torch.full_like(self.upper, 1.0 / self.num_steps), torch.zeros_like(self.upper)

    def _calibrate(self, x: Tensor) -> None:
        lower = float(x.min())
        if self.spec.start == "paper":
            std = float(x.std()) if x.numel() > 1 else 0.0
            upper = 3 * std / (1 - 2 / torch.pi) ** 0.5
        else:
            upper = best_range(sample(x), lower, self.num_steps, symmetric=False)
        self.lower.fill_(lower)
        self.upper.fill_(upper if upper > lower else lower + 1.0)
