"""The project's one rounding rule, and the small autograd functions that several papers share.

Every uniform quantizer computes its step first, divides by it in float32, rounds halves to even, and returns
``code * scale + offset``. The trainer, the exporter and the parity check all come through these functions, so
they cannot disagree about a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .native import Bound, Slope
from .tiles import Out, in_tiles, indicator

SMALLEST_STEP = 1e-8
"""Steps, ranges and scales never fall below this."""


def to_codes(x: Tensor, step: Tensor, low: Bound, high: Bound, *, out: Out = None) -> Tensor:
    """Return the codes of ``x`` as whole numbers in floating point: ``clip(round(x / step), low, high)``.

    Args:
        x: values, any shape, float32.
        step: positive, broadcasts against ``x``.
        low: smallest code.
        high: largest code.
        out: where they go.

    Returns:
        The codes, of the shape of ``x``.

    >>> to_codes(torch.tensor([-1.0, 0.5, 1.5, 9.0]), torch.tensor(1.0), 0, 3).tolist()
    [0.0, 0.0, 2.0, 3.0]
    """
    codes = torch.div(x, step, out=out).round_()
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return codes.clamp_(torch.as_tensor(low, device=x.device), torch.as_tensor(high, device=x.device))
    return codes.clamp_(low, high)


def codes_above(x: Tensor, lower: Tensor, step: Tensor, num_steps: int, *, out: Out = None) -> Tensor:
    """Codes of a grid that starts at ``lower``: ``clip(round((x - lower) / step), 0, num_steps)``.

    >>> codes_above(torch.tensor([-1.0, 0.5, 1.5, 9.0]), torch.tensor(-1.0), torch.tensor(1.0), 3).tolist()
    [0.0, 2.0, 2.0, 3.0]
    """
    return to_codes(torch.sub(x, lower, out=out), step, 0, num_steps, out=out)


class _RoundToCodes(torch.autograd.Function):
    """Codes forward; straight through backward: d code / d x := 1 / step, everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
        ctx.save_for_backward(step)
        return to_codes(x, step, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (step,) = ctx.saved_tensors
        return grads[0] / step, None, None, None


def codes_ste(x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
    """Codes of ``x`` with a straight-through gradient.

    Forward:  c(x) = clip(round(x / step), low, high)
    Backward: dc/dx = 1 / step, also outside the range; ``step`` gets no gradient.
    """
    codes: Tensor = _RoundToCodes.apply(x, step, low, high)
    return codes


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clamp(min=SMALLEST_STEP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        # A descent step subtracts the gradient: below the floor only negative ones, which raise the value, pass.
        return torch.where(value > SMALLEST_STEP, grads[0], grads[0].clamp(max=0.0))


def positive(value: Tensor) -> Tensor:
    """Keep a learned step, range or scale positive, without a dead end at the floor.

    Forward:  max(value, 1e-8)
    Backward: g above the floor; min(g, 0) at and below it, so that descent can only raise the value.

    >>> positive(torch.tensor([0.5, -3.0])).tolist()
    [0.5, 9.99999993922529e-09]
    """
    kept: Tensor = _Positive.apply(value)
    return kept


class _Sign(torch.autograd.Function):
    """Signs forward; backward the slope that the caller wants, a function of ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Slope, clip: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.clip = slope, clip
        ctx.native = x.dtype == torch.float32 and native.serves(x)  # a compiled graph fuses signs by itself
        if ctx.native:
            return native.sign(x)
        (signs,) = in_tiles(lambda v, out: (_sign(v, out),), 1, x)
        return signs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # Else by operators.
        if ctx.native and native.takes_gradient(grads[0]):
            return native.sign_backward(x, grads[0], ctx.slope, ctx.clip), None, None
        slope = _SLOPES[ctx.slope]
        (grad,) = in_tiles(lambda v, g, out: (torch.mul(g, slope(v, ctx.clip), out=out),), 1, x, grads[0])
        return grad, None, None


def _sign(x: Tensor, out: Out = None) -> Tensor:
    """+1 where ``x >= 0``, -1 elsewhere: sign(0) is +1, or a network behind a ReLU would be ternary."""
    return indicator(torch.ge, x, 0, out).mul_(2).sub_(1)


def _within(x: Tensor, clip: float) -> Tensor:
    """1 where ``abs(x) <= clip``, else 0."""
    return indicator(torch.le, x.abs(), clip)


def _below(x: Tensor, clip: float) -> Tensor:
    """1 where ``abs(x) < clip``, else 0."""
    return indicator(torch.lt, x.abs(), clip)


def _tent(x: Tensor, clip: float) -> Tensor:
    """``2 - 2 abs(x)`` down to 0, whatever ``clip``."""
    return (2.0 - 2.0 * x.abs()).clamp_(min=0.0)


_SLOPES: dict[Slope, Callable[[Tensor, float], Tensor]] = {"within": _within, "below": _below, "tent": _tent}


def sign_ste(x: Tensor, clip: float = 1.0, *, strict: bool = False) -> Tensor:
    """Binarize to -1 or +1 with a clipped straight-through gradient.

    Forward:  q(x) = +1 if x >= 0 else -1
    Backward: dq/dx = 1 if abs(x) <= clip else 0

    Args:
        x: values, any shape.
        clip: half the width of the window that lets gradients pass; ``inf`` is the identity.
        strict: whether the window's ends themselves are outside, abs(x) < clip.

    >>> x = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
    >>> q = sign_ste(x)
    >>> q.sum().backward()
    >>> q.tolist(), x.grad.tolist()
    ([-1.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    """
    signs: Tensor = _Sign.apply(x, "below" if strict else "within", clip)
    return signs


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clip, ctx.scale_shape = clip, scale.shape
        return _sign(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        grad_scale = (grads[0] * _sign(x)).sum_to_size(ctx.scale_shape) if ctx.needs_input_grad[1] else None
        return grads[0] * _within(x, ctx.clip), grad_scale, None


def scaled_sign(x: Tensor, scale: Tensor, clip: float = 1.0) -> Tensor:
    """Binarize to -scale or +scale; the value carries the scale, the straight-through gradient does not.

    Forward:  q(x) = scale if x >= 0 else -scale
    Backward: dq/dx = 1 if abs(x) <= clip else 0; dq/dscale = sign(x)

    Args:
        x: values, any shape.
        scale: positive, broadcasts against ``x``; detach it where the method does.
        clip: half the width of the window that lets gradients pass; ``inf`` is the identity.

    >>> x = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
    >>> q = scaled_sign(x, torch.tensor(0.25))
    >>> q.sum().backward()
    >>> q.tolist(), x.grad.tolist()
    ([-0.25, 0.25, 0.25], [0.0, 1.0, 1.0])
    """
    values: Tensor = _ScaledSign.apply(x, scale, clip)
    return values


def sign_polynomial(x: Tensor) -> Tensor:
    """Binarize to -1 or +1 with Bi-Real Net's piecewise polynomial gradient (ECCV 2018, Eq. 7).

    Forward:  q(x) = +1 if x >= 0 else -1
    Backward: dq/dx = 2 + 2x on [-1, 0), 2 - 2x on [0, 1], 0 elsewhere

    >>> x = torch.tensor([-2.0, -0.5, 0.0], requires_grad=True)
    >>> sign_polynomial(x).sum().backward()
    >>> x.grad.tolist()
    [0.0, 1.0, 2.0]
    """
    signs: Tensor = _Sign.apply(x, "tent", 1.0)
    return signs
