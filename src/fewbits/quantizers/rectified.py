"""What a ReLU gives, quantized: both in one pass over memory where ``native`` serves, bit for bit as one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import native
from .learned_step import lsq
from .lsq import LSQActivation

CEILINGS: dict[type[nn.Module], float] = {nn.ReLU: float("inf"), nn.ReLU6: 6.0}
"""The largest value that each ReLU gives."""


def quantize_rectified(quantizer: LSQActivation, relu: nn.Module, x: Tensor) -> Tensor:
    """``quantizer(relu(x))``, values and gradients, without its hooks.

    Args:
        quantizer: of what the ReLU gives.
        relu: of a type in ``CEILINGS``.
        x: any shape.
    """
    step, low, high, gradient_scale = quantizer.grid(x)
    if native.serves(x, step) and bool(quantizer.enabled):
        y: Tensor = _RectifiedLSQ.apply(x, step, low, high, gradient_scale, CEILINGS[type(relu)])
        return y
    # Not in place, even where the ReLU works so: what a quantizer took may be needed again.
    return type(quantizer).forward(quantizer, _function(CEILINGS[type(relu)])(x))


class _RectifiedLSQ(torch.autograd.Function):
    """``lsq`` of a ReLU's result; keeps the ReLU's input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: int, high: int, gradient_scale: float, ceiling: float
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.grid, ctx.ceiling = (low, high, gradient_scale), ceiling
        return native.lsq(x, step, low, high, ceiling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, step = ctx.saved_tensors
        low, high, gradient_scale = ctx.grid
        if native.takes_gradient(grads[0]):
            found = native.lsq_backward(x, grads[0], step, low, high, gradient_scale, ctx.ceiling)
            return *found, None, None, None, None
        with torch.enable_grad():  # somebody wants the gradient's gradient, or many gradients at once
            y = lsq(_function(ctx.ceiling)(x), step, low, high, gradient_scale)
            grad_x, grad_step = torch.autograd.grad(y, (x, step), grads[0], create_graph=True)
        return grad_x, grad_step, None, None, None, None


def _function(ceiling: float) -> Callable[[Tensor], Tensor]:
    return F.relu if ceiling == float("inf") else lambda x: F.hardtanh(x, 0.0, ceiling)
