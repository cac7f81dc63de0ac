"""DTQ's linear quantizer with dynamic ranges (after Jacob et al., CVPR 2018; Xie et al., ECCV 2020, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from .base import Codes, Engine, Quantizer
from .rounding import SMALLEST_STEP, to_codes


class _RoundInRange(torch.autograd.Function):
    """Rounding whose step stays in the graph: straight through, plus the rounding error's share for the step."""

    @staticmethod
    def forward(ctx: object, x: Tensor, step: Tensor, lowest: Tensor, num_steps: int) -> Tensor:
        ctx.save_for_backward(x, step, lowest)  # type: ignore[attr-defined]
        ctx.num_steps = num_steps  # type: ignore[attr-defined]
        return to_codes(x - lowest, step, 0, num_steps).mul_(step).add_(lowest)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step, lowest = ctx.saved_tensors  # type: ignore[attr-defined]
        scaled = (x - lowest) / step
        error = to_codes(x - lowest, step, 0, ctx.num_steps) - scaled  # type: ignore[attr-defined]
        # d/dlowest is zero: what the offset adds, the subtraction takes away.
        return grads[0], (grads[0] * error).sum(), None, None


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
        if self.spec.role == "activation" and dist.is_available() and dist.is_initialized():
            lowest, highest = _ExtremesEverywhere.apply(x)
        else:
            lowest, highest = x.amin(), x.amax()
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
        codes = to_codes(x - lowest, step, 0, self.num_steps)
        return Codes(codes.to(torch.int32), step, lowest, 0, self.num_steps)


class _ExtremesEverywhere(torch.autograd.Function):
    """Smallest and largest value over all processes.

    Their gradients are summed over the processes, and elements that tie share them evenly wherever they are, as amin
    and amax do in one process: zero ties a thousand times behind a ReLU.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.stack([-x.amin(), x.amax()])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        lowest, highest = -ends[0], ends[1].clone()
        ctx.save_for_backward(x, lowest, highest)  # type: ignore[attr-defined]
        return lowest, highest

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        x, lowest, highest = ctx.saved_tensors  # type: ignore[attr-defined]
        at_lowest, at_highest = x == lowest, x == highest
        sums = torch.stack([*grads, at_lowest.sum(), at_highest.sum()])
        dist.all_reduce(sums)
        return at_lowest * (sums[0] / sums[2]) + at_highest * (sums[1] / sums[3])
