"""LSQ's function: a step that learns, Eqs. 1 to 3 of the paper (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fused, graph, native
from .native import Bound
from .rounding import SMALLEST_STEP, positive, to_codes
from .sums import halved_sum
from .tiles import Elementwise, Out, in_tiles, indicator, laid_like


class _LearnedStep(torch.autograd.Function):
    """Backward recomputes the codes from ``x`` instead of storing them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, step, *_tensors(low, high))
        ctx.bounds, ctx.gradient_scale = (low, high), gradient_scale
        (y,) = _elementwise(step, lambda v, out: (to_codes(v, step, low, high, out=out).mul_(step),), 1, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, step, *bounds = ctx.saved_tensors
        return *_by_operators(x, grads[0], step, bounds or ctx.bounds, ctx.gradient_scale), None, None, None


def _by_operators(
    x: Tensor, grad: Tensor, step: Tensor, bounds: Sequence[Bound], gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and of a positive ``step``."""
    low, high = bounds
    grad_x, share = _elementwise(step, lambda *of: _gradients(step, low, high, *of), 2, x, grad)
    groups = _num_groups(x, step)
    grad_step = share.sum_to_size(step.shape) if groups is None else halved_sum(share, groups).view(step.shape)
    return grad_x, grad_step * gradient_scale


class _InOnePass(torch.autograd.Function):
    """The same by whoever passes over memory once, see ``_way``; they keep the step positive and mind a gate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float, gate: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, step, gate, *_tensors(low, high))
        ctx.bounds, ctx.gradient_scale = (low, high), gradient_scale
        return _way(x).lsq(x, step, low, high, *_given(gate))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, step, gate, *bounds = ctx.saved_tensors
        grad, (low, high), scale = grads[0], bounds or ctx.bounds, ctx.gradient_scale
        if torch.compiler.is_compiling() or native.takes_gradient(grad):
            found = _way(x).lsq_backward(x, grad, step, low, high, scale, *_given(gate))
            return *found, None, None, None, None
        # Somebody wants the gradient's gradient, or many gradients at once, which operators have.
        grad_x, grad_step = _by_operators(x.float(), grad, positive(step), (low, high), scale)
        grad_step = torch.where(step > SMALLEST_STEP, grad_step, grad_step.clamp(max=0.0))
        if gate is not None:
            grad_x, grad_step = torch.where(gate, grad_x, grad), torch.where(gate, grad_step, 0.0)
        grad_x = grad_x.to(x.dtype)
        return grad_x, grad_step, None, None, None, None


def _way(x: Tensor) -> Any:
    """What computes LSQ in one pass here: a module with ``serves``, ``lsq`` and ``lsq_backward``."""
    if torch.compiler.is_compiling():
        return graph
    return fused if x.device.type in fused.DEVICES else native


def _given(gate: Tensor | None) -> list[Tensor]:
    """Eager code on a processor reads a gate before it gets here: ``native`` knows of none."""
    return [] if gate is None else [gate]


def _tensors(low: Bound, high: Bound) -> list[Tensor]:
    """Bounds that must be kept as tensors are; both are, or none."""
    return [bound for bound in (low, high) if isinstance(bound, Tensor)]


def _num_groups(x: Tensor, step: Tensor) -> int | None:
    """How many values, one behind the other in memory, share a step each; None where that is not how it is."""
    if step.numel() == 1 and step.ndim <= x.ndim:
        return 1
    is_first = step.ndim == x.ndim and 0 < step.shape[0] == step.numel() == x.shape[0]
    return x.shape[0] if is_first and torch.empty_like(x).stride(0) * x.shape[0] == x.numel() else None


def _gradients(
    step: Tensor, low: Bound, high: Bound, x: Tensor, grad: Tensor, out_x: Out, out_share: Out
) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, and what each element adds to the step's before the gradient scale."""
    scaled = x / step
    clipped = scaled.clamp(low, high)  # type: ignore[arg-type]
    inside = indicator(torch.eq, scaled, clipped)
    # Inside the range the clipped value is the value itself; outside, round() leaves the whole bound alone:
    # so round(clipped) - clipped * inside is round(v/s) - v/s, -Q_N or +Q_P.
    slope = clipped.round().sub_(clipped.mul_(inside))
    return torch.mul(grad, inside, out=out_x), torch.mul(grad, slope, out=out_share)


def _elementwise(step: Tensor, function: Elementwise, num_results: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In tiles, where one step serves all elements and nobody wants its gradient from them."""
    if step.ndim or (torch.is_grad_enabled() and step.requires_grad):
        laid = tensors if torch.compiler.is_compiling() else [laid_like(tensor, tensors[0]) for tensor in tensors]
        return function(*laid, *[None] * num_results)
    return in_tiles(function, num_results, *tensors)


def lsq(x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float = 1.0) -> Tensor:
    """Quantize with a learned step (Eqs. 1 to 3 of the paper).

    Forward:  step * round(clip(x / step, low, high))
    Backward: d/dx = 1 where low <= x/step <= high, else 0
              d/dstep = round(x/step) - x/step inside, low below, high above; times ``gradient_scale``

    Args:
        x: values, any shape, float32.
        step: 0-d or broadcasting against ``x``; kept positive, see ``positive``.
        low: smallest code, -Q_N.
        high: largest code, Q_P.
        gradient_scale: 1 / sqrt(N Q_P), N the number of values that share a step (without the batch).

    >>> x = torch.tensor([-1.0, 0.3, 0.8, 5.0], requires_grad=True)
    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> y = lsq(x, step, 0, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist(), round(step.grad.item(), 4)
    ([0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 1.0, 0.0], 3.8)
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
    if fits_one_pass(x, step, low, high):
        return in_one_pass(x, step, low, high, gradient_scale, None)
    y: Tensor = _LearnedStep.apply(x, positive(step), low, high, gradient_scale)
    return y


def fits_one_pass(x: Tensor, step: Tensor, low: Bound, high: Bound) -> bool:
    """Whether somebody here computes it in one pass over memory."""
    bounds = _tensors(low, high)
    if x.numel() == 0 or any(bound.ndim for bound in bounds) or _num_groups(x, step) is None:
        return False
    return bool(_way(x).serves(x, step, *bounds))


def in_one_pass(x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float, gate: Tensor | None) -> Tensor:
    """``lsq`` where ``fits_one_pass``, and ``x`` behind a closed ``gate`` (0-d, boolean; None is open)."""
    y: Tensor = _InOnePass.apply(x, step, low, high, gradient_scale, gate)
    return y
