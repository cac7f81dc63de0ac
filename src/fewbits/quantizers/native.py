"""LSQ and signs in one pass over memory, by ``kernels.cpp``, called without a copy.

PyTorch runs LSQ as eight operators forward and more backward, each a pass over memory. Where ``serves`` says no, the
same results come from PyTorch's operators; a compiled graph has its own way (graph.py).
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor, nn

from .library import load
from .sums import BLOCK, power_of_two
from .tiles import laid_like

Bound = int | Tensor
"""A clipping bound on codes: a whole number, or a tensor of whole numbers that broadcasts."""

Slope = Literal["within", "below", "tent"]
"""What a sign's gradient is multiplied with: 1 where abs(x) <= clip; 1 where abs(x) < clip; 2 - 2 abs(x) down to 0."""

_SLOPES: tuple[Slope, ...] = ("within", "below", "tent")
NO_RELU = 0.0
"""In place of a ReLU's largest value: there is no ReLU."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_FEW = 1 << 15
"""Elements that one thread passes over faster than a second one starts."""


def is_available() -> bool:
    """Whether there are compiled functions; the first call makes them, which takes about a second, once."""
    return load()[0] is not None


def reason() -> str:
    """Why there are none, for a person; empty where there are."""
    return load()[1]


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the compiled functions take these.

    Args:
        x: a tensor of a processor, float32 or bfloat16; in memory, not a tracer's.
        parameters: what belongs to it, float32.
    """
    if (
        torch.compiler.is_compiling()
        or x.dtype not in _TYPES
        or any(parameter.dtype != torch.float32 for parameter in parameters)
    ):
        return False
    if any(tensor.device.type != "cpu" for tensor in (x, *parameters)):
        return False
    # Fakes have no memory to pass over, and what traces by dispatch must see operators.
    are_plain = all(type(each) in (Tensor, nn.Parameter) and not each.is_neg() for each in (x, *parameters))
    return are_plain and not is_traced() and is_available()


def takes_gradient(grad: Tensor) -> bool:
    """Whether it has values of its own (``is_grads_batched`` passes many at once) and nobody wants its gradient."""
    return torch._C._has_storage(grad) and not torch.is_grad_enabled()


def is_traced() -> bool:
    """Whether somebody other than the compiler looks on, who must see operators."""
    stacks = torch._C._len_torch_dispatch_stack(), torch._ops._len_torch_dispatch_stack_pre_dispatch()
    return torch.jit.is_tracing() or any(stacks)  # type: ignore[attr-defined]


def lsq(x: Tensor, step: Tensor, low: Bound, high: Bound, ceiling: float = NO_RELU) -> Tensor:
    """LSQ forward, see ``learned_step.lsq``, of ``x`` or of what a ReLU makes of it.

    Args:
        x: values, any shape, float32 or bfloat16.
        step: float32, one, or one for each index of the first dimension.
        low, high: the codes' bounds; tensors are 0-d and float32.
        ceiling: the ReLU's largest value, infinity where it has none; ``NO_RELU`` is no ReLU.

    Returns:
        float32, of the shape of ``x``.
    """
    x, y = dense(x, torch.float32)
    step = step.contiguous()
    values = (_at(x), _TYPES[x.dtype], ctypes.c_float(ceiling))
    grid = (*_groups(x, step), _at(step), _number(low), _number(high))
    _library().fewbits_lsq(*values, _at(y), *grid, _threads(x))
    return y


def lsq_backward(
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    low: Bound,
    high: Bound,
    gradient_scale: float,
    ceiling: float = NO_RELU,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x``, in its type, and of ``step``; see ``lsq``."""
    x, grad_x = dense(x)
    grad, step = laid_like(grad.resolve_neg(), x), step.contiguous()
    grad_step = torch.empty_like(step)
    groups, inner = _groups(x, step)
    num_sums = step.numel() * power_of_two(-(-x.numel() // step.numel() // BLOCK))
    sums = torch.empty(num_sums, dtype=torch.float32, device="cpu")
    values = (_at(x), _TYPES[x.dtype], ctypes.c_float(ceiling))
    given = (*values, _at(grad), _TYPES[grad.dtype], _at(grad_x), _at(grad_step), _at(sums))
    grid = (groups, inner, _at(step), _number(low), _number(high), ctypes.c_float(gradient_scale))
    _library().fewbits_lsq_backward(*given, *grid, _threads(x))
    return grad_x, grad_step


def sign(x: Tensor) -> Tensor:
    """+1 where ``x >= 0``, else -1; float32."""
    x, y = dense(x)
    _library().fewbits_sign(_at(x), _at(y), ctypes.c_long(x.numel()), _threads(x))
    return y


def sign_backward(x: Tensor, grad: Tensor, slope: Slope, bound: float) -> Tensor:
    """``grad`` times a slope of ``rounding.py``: within ``abs(x) <= bound``, below it, or the tent; float32."""
    x, grad_x = dense(x)
    grad = laid_like(grad.resolve_neg(), x)
    size, number = ctypes.c_long(x.numel()), _SLOPES.index(slope)
    _library().fewbits_sign_backward(_at(x), _at(grad), _at(grad_x), size, number, ctypes.c_float(bound), _threads(x))
    return grad_x


def dense(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``x`` without holes, and room for a result that lies in memory as it does."""
    result = torch.empty_like(x, dtype=dtype)
    return x if x.stride() == result.stride() else torch.empty_like(x).copy_(x), result


def _groups(x: Tensor, step: Tensor) -> tuple[ctypes.c_long, ctypes.c_long]:
    """How many steps there are, and how many elements share one."""
    return ctypes.c_long(step.numel()), ctypes.c_long(x.numel() // step.numel())


def _number(bound: Bound) -> ctypes.c_void_p | ctypes._CArgObject:
    return _at(bound) if isinstance(bound, Tensor) else ctypes.byref(ctypes.c_float(bound))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > _FEW else 1


def _library() -> ctypes.CDLL:
    library, why = load()
    if library is None:
        raise RuntimeError(f"fewbits has no compiled functions here: {why}")
    return library
