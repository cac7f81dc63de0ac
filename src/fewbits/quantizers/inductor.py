"""What Inductor, the compiler behind ``torch.compile``, makes of the operators of graph.py: loops of its own.

They are expressions of single elements, and one sum, that it can write into the loops before and behind them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .rounding import SMALLEST_STEP

DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Belongs into the operators' names, which are part of the key under which compiled graphs are kept on disk: another
version of this file must not find them."""


@cache
def write_into_loops(lsq: Any, lsq_backward: Any, lsq_codes: Any) -> None:
    """Tell the compiler of graph.py's operators, once for the process."""
    from torch._inductor import lowering

    aten, convert, ways = torch.ops.aten, torch.ops.prims.convert_element_type.default, lowering.lowerings

    def scaled(x: Any, step: Any) -> tuple[Any, Any]:
        positive = ways[aten.clamp_min.default](step, SMALLEST_STEP)
        return ways[aten.div.Tensor](ways[convert](x, torch.float32), positive), positive

    def clipped(x: Any, low: Any, high: Any) -> Any:
        return ways[aten.minimum.default](ways[aten.maximum.default](x, low), high)

    def forward(x: Any, step: Any, low: Any, high: Any, gate: Any) -> Any:
        _settle_layouts(x)
        values, positive = scaled(x, step)
        y = ways[aten.mul.Tensor](clipped(ways[aten.round.default](values), low, high), positive)
        return y if gate is None else ways[aten.where.self](gate, y, ways[convert](x, torch.float32))

    def codes(x: Any, step: Any, low: Any, high: Any) -> Any:
        _settle_layouts(x)
        values, _ = scaled(x, step)
        above = ways[aten.sub.Tensor](clipped(ways[aten.round.default](values), low, high), low)
        return ways[convert](above, torch.uint8)

    def backward(x: Any, grad: Any, step: Any, low: Any, high: Any, scale: Any, gate: Any) -> tuple[Any, Any]:
        _settle_layouts(x, grad)
        values, _ = scaled(x, step)
        bounded = clipped(values, low, high)
        inside, codes = ways[aten.eq.Tensor](values, bounded), ways[aten.round.default](bounded)
        slope = ways[aten.where.self](inside, ways[aten.sub.Tensor](codes, values), codes)
        share = ways[aten.mul.Tensor](grad, slope)
        shared = [1] * (len(x.get_size()) - len(step.get_size())) + [*step.get_size()]
        dims = [dim for dim, size in enumerate(shared) if size == 1]
        sums = ways[aten.sum.dim_IntList](share, dims, True) if dims else share
        grad_step = ways[aten.mul.Tensor](ways[aten.view.default](sums, [*step.get_size()]), scale)
        zero = ways[aten.full.default]([], 0.0, dtype=torch.float32, device=grad.get_device())
        is_above = ways[aten.gt.Scalar](step, SMALLEST_STEP)
        grad_step = ways[aten.where.self](is_above, grad_step, ways[aten.minimum.default](grad_step, zero))
        # A product: a gradient that is not finite stays so, and is seen.
        grad_x = ways[aten.mul.Tensor](grad, ways[convert](inside, torch.float32))
        if gate is not None:
            grad_x, grad_step = ways[aten.where.self](gate, grad_x, grad), ways[aten.where.self](gate, grad_step, zero)
        return ways[convert](grad_x, x.get_dtype()), grad_step

    for operator, way in ((lsq, forward), (lsq_backward, backward), (lsq_codes, codes)):
        lowering.register_lowering(operator, type_promotion_kind=None)(way)


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
