"""LSQ as one operator of a compiled graph, ``fewbits::lsq_...``, on any device.

A compiler sees arithmetic and cannot tell what quantizes: as an operator it can be found again, and be computed a
second time where its result would have to be kept (training/compiling.py, which also says how it fuses).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import inductor
from .native import Bound
from .rounding import SMALLEST_STEP, to_codes

TYPES = (torch.float32, torch.bfloat16)
"""Of values; they are computed in float32."""

_NAMES = ("lsq", "lsq_backward", "lsq_codes")
_FORWARD, _BACKWARD, _CODES = (f"fewbits::{name}_{inductor.DIGEST}" for name in _NAMES)
_GIVEN = "Tensor step, Tensor low, Tensor high"
torch.library.define(_FORWARD, f"(Tensor x, {_GIVEN}, Tensor? gate) -> Tensor")
torch.library.define(_BACKWARD, f"(Tensor x, Tensor grad, {_GIVEN}, float scale, Tensor? gate) -> (Tensor, Tensor)")
torch.library.define(_CODES, f"(Tensor x, {_GIVEN}) -> Tensor")
LSQ, LSQ_BACKWARD, LSQ_CODES = (
    getattr(torch.ops.fewbits, name.split("::")[1]).default for name in (_FORWARD, _BACKWARD, _CODES)
)
"""The operators; the last one gives bytes, codes counted from the lowest one, whatever a gate says."""

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
    """LSQ forward, see ``learned_step.lsq``; ``x`` while the ``gate`` is closed.

    Args:
        x: values, any shape, float32 or bfloat16.
        step: float32, broadcasts against ``x``.
        low, high: the codes' bounds; tensors are 0-d and float32.
        gate: 0-d, boolean; None is open.

    Returns:
        float32, of the shape of ``x``.
    """
    y: Tensor = LSQ(x, step, *bounds_for(step, low, high), gate)
    return y


def lsq_backward(
    x: Tensor, grad: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x``, in its type, and of ``step``; zeros for ``step`` behind a closed gate."""
    grad_x, grad_step = LSQ_BACKWARD(x, grad, step, *bounds_for(step, low, high), gradient_scale, gate)
    return grad_x, grad_step


def bounds_for(step: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """0-d, on the device of ``step``, where a graph reads them."""
    given = (low, high)
    first, last = (
        bound if isinstance(bound, Tensor) else torch.full((), float(bound), device=step.device) for bound in given
    )
    return first, last


@torch.library.register_fake(_FORWARD)  # type: ignore[untyped-decorator]
def _(x: Tensor, step: Tensor, low: Tensor, high: Tensor, gate: Tensor | None) -> Tensor:
    inductor.write_into_loops(LSQ, LSQ_BACKWARD, LSQ_CODES)  # whoever traces a graph with it is going to compile it
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.register_fake(_BACKWARD)  # type: ignore[untyped-decorator]
def _(
    x: Tensor, grad: Tensor, step: Tensor, low: Tensor, high: Tensor, scale: float, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(step, memory_format=torch.contiguous_format)


@torch.library.register_fake(_CODES)  # type: ignore[untyped-decorator]
def _(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


# For other compilers than Inductor, which writes them into its loops (inductor.py).


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _(x: Tensor, step: Tensor, low: Tensor, high: Tensor, gate: Tensor | None) -> Tensor:
    step = step.clamp(min=SMALLEST_STEP)
    y = to_codes(x.float(), step, low, high) * step
    return y if gate is None else torch.where(gate, y, x)


@torch.library.impl(_CODES, "CompositeExplicitAutograd")
def _(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (to_codes(x.float(), step.clamp(min=SMALLEST_STEP), low, high) - low).to(torch.uint8)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _(
    x: Tensor, grad: Tensor, step: Tensor, low: Tensor, high: Tensor, scale: float, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    scaled = x.float() / step.clamp(min=SMALLEST_STEP)
    clipped = scaled.clamp(low, high)
    inside, codes = scaled == clipped, clipped.round()
    share = grad * torch.where(inside, codes - scaled, codes)
    grad_x = grad * inside
    # A descent step subtracts it: at the floor only what raises the step passes, see ``rounding.positive``.
    grad_step = share.sum_to_size(step.shape) * scale
    grad_step = torch.where(step > SMALLEST_STEP, grad_step, grad_step.clamp(max=0.0))
    if gate is not None:
        grad_x, grad_step = torch.where(gate, grad_x, grad), torch.where(gate, grad_step, 0.0)
    return torch.empty_like(x).copy_(grad_x), grad_step
