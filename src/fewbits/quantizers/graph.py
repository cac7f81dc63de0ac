"""LSQ as one operator of a compiled graph, ``fewbits::lsq``, on any device.

A compiler sees arithmetic and cannot tell what quantizes: as an operator it can be found again, and be computed a
second time where its result would have to be kept (training/compiling.py, which also says how it fuses).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import inductor
from .native import Bound
from .rounding import SMALLEST_STEP

TYPES = (torch.float32, torch.bfloat16)
"""Of values; they are computed in float32."""

OPTIONS: dict[str, Any] = {"eager_numerics.division_rounding": True}
"""What a compiler must be told: a GPU's fast division is not the rounding rule's."""


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the graph that is being traced may hold the operator: an exported one goes to others, who do not know it.

    Args:
        x: float32 or bfloat16.
        parameters: what belongs to it, float32.
    """
    are_known = x.dtype in TYPES and all(parameter.dtype == torch.float32 for parameter in parameters)
    return are_known and not torch.compiler.is_exporting()


def lsq(x: Tensor, step: Tensor, low: Bound, high: Bound, gate: Tensor | None = None) -> Tensor:
    """LSQ forward, see ``lsq.lsq``; ``x`` while the ``gate`` is closed.

    Args:
        x: values, any shape, float32 or bfloat16.
        step: float32, broadcasts against ``x``.
        low, high: the codes' bounds; tensors are 0-d and float32.
        gate: 0-d, boolean; None is open.

    Returns:
        float32, of the shape of ``x``.
    """
    return torch.ops.fewbits.lsq(x, step, _tensor(low, step), _tensor(high, step), gate)


def lsq_backward(
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    low: Bound,
    high: Bound,
    gradient_scale: float | Tensor,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x``, in its type, and of ``step``; zeros for ``step`` behind a closed gate."""
    grad_x, grad_step = torch.ops.fewbits.lsq_backward(x, grad, step, _tensor(low, step), _tensor(high, step), gate)
    grad_step = grad_step * gradient_scale
    # A descent step subtracts it: at the floor only what raises the step passes, see ``rounding.positive``.
    grad_step = torch.where(step > SMALLEST_STEP, grad_step, grad_step.clamp(max=0.0))
    return grad_x, grad_step if gate is None else torch.where(gate, grad_step, 0.0)


def _tensor(bound: Bound, like: Tensor) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.full((), float(bound), device=like.device)


torch.library.define("fewbits::lsq", "(Tensor x, Tensor step, Tensor low, Tensor high, Tensor? gate) -> Tensor")
torch.library.define(
    "fewbits::lsq_backward",
    "(Tensor x, Tensor grad, Tensor step, Tensor low, Tensor high, Tensor? gate) -> (Tensor, Tensor)",
)


@torch.library.register_fake("fewbits::lsq")  # type: ignore[untyped-decorator]
def _(x: Tensor, step: Tensor, low: Tensor, high: Tensor, gate: Tensor | None) -> Tensor:
    inductor.write_into_loops()  # whoever traces a graph with it is going to compile it
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.register_fake("fewbits::lsq_backward")  # type: ignore[untyped-decorator]
def _(x: Tensor, grad: Tensor, step: Tensor, low: Tensor, high: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(step, memory_format=torch.contiguous_format)


# For other compilers than Inductor, which writes both into its loops (inductor.py).


@torch.library.impl("fewbits::lsq", "CompositeExplicitAutograd")
def _(x: Tensor, step: Tensor, low: Tensor, high: Tensor, gate: Tensor | None) -> Tensor:
    step = step.clamp(min=SMALLEST_STEP)
    y = (x.float() / step).round().clamp(low, high) * step
    return y if gate is None else torch.where(gate, y, x)


@torch.library.impl("fewbits::lsq_backward", "CompositeExplicitAutograd")
def _(x: Tensor, grad: Tensor, step: Tensor, low: Tensor, high: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    scaled = x.float() / step.clamp(min=SMALLEST_STEP)
    clipped = scaled.clamp(low, high)
    inside, codes = scaled == clipped, clipped.round()
    share = grad * torch.where(inside, codes - scaled, codes)
    grad_x = torch.where(inside, grad, 0.0)
    if gate is not None:
        grad_x = torch.where(gate, grad_x, grad)
    return torch.empty_like(x).copy_(grad_x), share.sum_to_size(step.shape)
