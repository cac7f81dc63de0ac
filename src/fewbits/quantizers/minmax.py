"""DTQ's linear quantizer with dynamic ranges (after Jacob et al., CVPR 2018; Xie et al., ECCV 2020, Eq. 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .base import Codes, Engine, Quantizer
from .rounding import SMALLEST_STEP, codes_above
from .tiles import Out, count, in_tiles, indicator


class _RoundInRange(torch.autograd.Function):
    """Rounding whose step stays in the graph: straight through, plus the rounding error's share for the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lowest: Tensor, num_steps: int) -> Tensor:
        ctx.save_for_backward(x, step, lowest)
        ctx.num_steps = num_steps
        (y,) = in_tiles(
            lambda v, out: (codes_above(v, lowest, step, num_steps, out=out).mul_(step).add_(lowest),), 1, x
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step, lowest = ctx.saved_tensors

        def share(v: Tensor, g: Tensor, out: Out) -> tuple[Tensor]:
            scaled = torch.sub(v, lowest).div_(step)
            error = scaled.round().clamp_(0, ctx.num_steps).sub_(scaled)
            return (torch.mul(g, error, out=out),)

        # d/dlowest is zero: what the offset adds, the subtraction takes away.
        return grads[0], in_tiles(share, 1, x, grads[0])[0].sum(), None, None


class MinMax(Quantizer):
    """Weights or activations from their own minimum to their own maximum, found anew in every forward pass.

    Forward:  round((x - lo) / s) * s + lo, s = (hi - lo) / (2**b - 1), lo and hi the extremes of the whole tensor
    Backward: identity, and lo and s stay in the graph: the largest element gets an extra
              sum(g (round(u) - u)) / (2**b - 1) with u = (x - lo) / s, the smallest one minus that

    Zero is in general not a level, while zero padding stays exactly zero. Ranges are dynamic at test time too, so
    results depend on the batch. Over several processes they are the extremes of the whole batch.
    """

    paper = "DTQ, Xie et al., ECCV 2020, Eq. 1"

    @property
    def engine(self) -> Engine:
        """Weights are fixed after training, but have a float offset; activation ranges change with every batch."""
        return "float"

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        everywhere = self.spec.role == "activation" and dist.is_available() and dist.is_initialized()
        lowest, highest = _Extremes.apply(x, everywhere)
        step = (highest - lowest) / self.num_steps
        # A constant tensor has no range; any step reproduces it exactly, for all codes are zero.
        return torch.where(step > SMALLEST_STEP, step, 1.0), lowest

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        step, lowest = self._range(x)
        y: Tensor = _RoundInRange.apply(x, step, lowest, self.num_steps)
        return y

    def _encode(self, x: Tensor) -> Codes:
        """Integers 0 to 2**b - 1 with the minimum as offset: of this tensor, in this batch."""
        step, lowest = self._range(x)
        codes = codes_above(x, lowest, step, self.num_steps)
        return Codes(codes.to(torch.int32), step, lowest, 0, self.num_steps)


class _Extremes(torch.autograd.Function):
    """Smallest and largest value, of this process or over all processes.

    Gradients are those of amin and amax: elements that tie share them evenly, wherever they are, for zero ties a
    thousand times behind a ReLU. Over processes they are summed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, everywhere: bool) -> tuple[Tensor, Tensor]:
        lowest, highest = x.amin(), x.amax()
        if everywhere:
            ends = torch.stack([-lowest, highest])
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            lowest, highest = -ends[0], ends[1].clone()
        ctx.save_for_backward(x, lowest, highest)
        ctx.everywhere = everywhere
        return lowest, highest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, lowest, highest = ctx.saved_tensors
        sums = torch.stack([*grads, count(torch.eq, x, lowest), count(torch.eq, x, highest)])
        if ctx.everywhere:
            dist.all_reduce(sums)
        to_lowest, to_highest = sums[0] / sums[2], sums[1] / sums[3]

        def shared(v: Tensor, out: Out) -> tuple[Tensor]:
            at_lowest = indicator(torch.eq, v, lowest, out).mul_(to_lowest)
            return (at_lowest.add_(indicator(torch.eq, v, highest).mul_(to_highest)),)

        return in_tiles(shared, 1, x)[0], None
