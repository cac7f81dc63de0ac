"""What Inductor, the compiler behind ``torch.compile``, makes of ``fewbits::lsq`` and its gradients: loops of its own.

Both are expressions of single elements, and one sum, that it can write into the loops before and behind them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .rounding import SMALLEST_STEP


@cache
def write_into_loops() -> None:
    """Tell the compiler, once for the process."""
    from torch._inductor import lowering

    aten, convert, ways = torch.ops.aten, torch.ops.prims.convert_element_type.default, lowering.lowerings

    def scaled(x: Any, step: Any) -> tuple[Any, Any]:
        positive = ways[aten.clamp_min.default](step, SMALLEST_STEP)
        return ways[aten.div.Tensor](ways[convert](x, torch.float32), positive), positive

    def clipped(x: Any, low: Any, high: Any) -> Any:
        return ways[aten.minimum.default](ways[aten.maximum.default](x, low), high)

    def lsq(x: Any, step: Any, low: Any, high: Any, gate: Any) -> Any:
        _settle_layouts(x)
        values, positive = scaled(x, step)
        y = ways[aten.mul.Tensor](clipped(ways[aten.round.default](values), low, high), positive)
        return y if gate is None else ways[aten.where.self](gate, y, ways[convert](x, torch.float32))

    def lsq_backward(x: Any, grad: Any, step: Any, low: Any, high: Any, gate: Any) -> tuple[Any, Any]:
        _settle_layouts(x, grad)
        values, _ = scaled(x, step)
        bounded = clipped(values, low, high)
        inside, codes = ways[aten.eq.Tensor](values, bounded), ways[aten.round.default](bounded)
        slope = ways[aten.where.self](inside, ways[aten.sub.Tensor](codes, values), codes)
        share = ways[aten.mul.Tensor](grad, slope)
        shared = [1] * (len(x.get_size()) - len(step.get_size())) + [*step.get_size()]
        sums = ways[aten.sum.dim_IntList](share, [dim for dim, size in enumerate(shared) if size == 1], True)
        grad_step = ways[aten.view.default](sums, [*step.get_size()])
        zero = ways[aten.full.default]([], 0.0, dtype=torch.float32, device=grad.get_device())
        grad_x = ways[aten.where.self](inside, grad, zero)
        if gate is not None:
            grad_x = ways[aten.where.self](gate, grad_x, grad)
        return ways[convert](grad_x, x.get_dtype()), grad_step

    for operator, way in ((torch.ops.fewbits.lsq, lsq), (torch.ops.fewbits.lsq_backward, lsq_backward)):
        lowering.register_lowering(operator.default, type_promotion_kind=None)(way)


def _settle_layouts(*tensors: Any) -> None:
    """Let what these are computed from decide how it lies in memory, the first first.

    A result of the compiler's lies as most of what it reads does. But what it reads may not have decided yet, and then
    counts as contiguous: so contiguous results appear in channels-last networks, and loops that transpose.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def settle(name: str) -> None:
        buffer = V.graph.name_to_buffer.get(name)
        if isinstance(buffer, ir.ComputedBuffer) and isinstance(buffer.layout, ir.FlexibleLayout):
            for read in buffer.get_read_names():
                settle(read)
            buffer.decide_layout()

    for tensor in tensors:
        for name in tensor.get_read_names():
            settle(name)
