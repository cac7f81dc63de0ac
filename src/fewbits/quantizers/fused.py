"""LSQ in one pass on GPUs outside of compiled graphs: Inductor's loops for it alone, made once for all shapes.

Nothing depends on it: where the compiler fails, or does not give what PyTorch's operators give, ``reason`` says so, and
they do it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import graph
from .native import Bound, dense, is_traced
from .tiles import laid_like

DEVICES = ("cuda", "xpu")
"""Types of devices on which operators are slow one by one, and Inductor writes kernels."""


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the compiled loops take these: on one of ``DEVICES``, in memory, ``x`` float32 or bfloat16."""
    if x.device.type not in DEVICES or torch.compiler.is_compiling():
        return False
    are_plain = all(type(each) in (Tensor, nn.Parameter) and not each.is_neg() for each in (x, *parameters))
    are_here = all(each.device == x.device for each in parameters)
    are_known = x.dtype in graph.TYPES and all(each.dtype == torch.float32 for each in parameters)
    are_several = all(x.numel() > each.numel() for each in parameters)  # one value a step would be a graph of its own
    return are_plain and are_here and are_known and are_several and not is_traced() and not reason(x.device)


@cache
def reason(device: torch.device) -> str:
    """Why there are none for this device, for a person; empty where there are. The first call compiles them."""
    try:
        step = torch.tensor([[0.5], [0.25]], device=device)
        x = torch.linspace(-4, 4, 2 * 4096, device=device).view(2, -1)  # eighths, sixteenths and ties are among them
        grad = torch.linspace(-1, 2, 2 * 4096, device=device).view(2, -1)
        for values, given, steps in ((x, grad, step), (x[:1], grad[:1], step[:1])):
            wanted = graph.lsq(values, steps, -2, 5), *graph.lsq_backward(values, given, steps, -2, 5, 0.5)
            found = lsq(values, steps, -2, 5), *lsq_backward(values, given, steps, -2, 5, 0.5)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    except Exception as error:  # whatever a compiler dies of: operators are there
        return str(error) or type(error).__name__
    return ""


@torch.no_grad()
def lsq(x: Tensor, step: Tensor, low: Bound, high: Bound, gate: Tensor | None = None) -> Tensor:
    """LSQ forward, see ``graph.lsq``; ``step`` is one, or one for each index of the first dimension.

    Nothing waits for the device: bounds and gate are read where they lie, and new bits compile nothing.
    """
    x, y = dense(x, torch.float32)
    given = _grouped(x, step), _grouped(step.contiguous(), step)
    with torch.autocast(x.device.type, enabled=False):  # which the compiler distinguishes, like gradient modes
        made = _compiled(graph.lsq)(*given, *graph.bounds_for(step, low, high), gate)
    return made.as_strided(y.shape, y.stride())


@torch.no_grad()
def lsq_backward(
    x: Tensor, grad: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``step``, see ``graph.lsq_backward``."""
    x, grad_x = dense(x)
    given = (_grouped(x, step), _grouped(laid_like(grad.resolve_neg(), x), step), _grouped(step.contiguous(), step))
    with torch.autocast(x.device.type, enabled=False):
        made, grad_step = _compiled(graph.lsq_backward)(*given, *graph.bounds_for(step, low, high), 1.0, gate)
    return made.as_strided(grad_x.shape, grad_x.stride()), grad_step.view(step.shape) * gradient_scale


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Without fullgraph: whatever could make it compile again and again makes it slow in the end, not fail.
    return torch.compile(function, dynamic=True, options=graph.OPTIONS)


def _grouped(x: Tensor, step: Tensor) -> Tensor:
    """In order of memory, a row for each step.

    A tensor on the same memory and no view of it: the compiler distinguishes views by what they are views of.
    """
    shape = (step.numel(), x.numel() // step.numel())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), shape, (shape[1], 1)
    )
