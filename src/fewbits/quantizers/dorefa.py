"""DoReFa-Net: fixed ranges, nothing learned (Zhou et al., arXiv 1606.06160)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Codes, Engine, Quantizer
from .rounding import SMALLEST_STEP, codes_ste, scaled_sign, sign_ste, to_codes
from .tiles import Out, in_tiles, indicator


class DoReFaWeight(Quantizer):
    """Weights squashed by tanh and spread over [-1, 1]; no zero level (Eq. 9 of the paper).

    Forward:  2 Q_b( tanh(w) / (2 max|tanh(w)|) + 1/2 ) - 1, Q_b(z) = round((2**b - 1) z) / (2**b - 1);
              one bit: mean|w| * sign(w) (Eq. 7), the mean over the layer and detached
    Backward: identity through the rounding; tanh and max are differentiated (the max is not detached);
              one bit: identity
    """

    paper = "DoReFa-Net, Zhou et al., arXiv 1606.06160"

    @property
    def engine(self) -> Engine:
        """Codes ``2q - (2**b - 1)`` are whole numbers around zero; at 8 bits they need nine and stay float."""
        return "integer" if self.bits == 1 else "shifted" if self.bits < 8 else "float"

    def _unit(self, w: Tensor) -> Tensor:
        squashed = torch.tanh(w)
        return squashed / (2 * squashed.abs().amax().clamp(min=SMALLEST_STEP)) + 0.5

    def _grid(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step in the unit interval, then scale and offset of the output."""
        step = torch.tensor(1.0 / self.num_steps, device=w.device)
        return step, 2 * step, torch.tensor(-1.0, device=w.device)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.bits == 1:
            return scaled_sign(x, _mean_magnitude(x), clip=float("inf"))
        step, scale, offset = self._grid(x)
        return codes_ste(self._unit(x), step, 0, self.num_steps) * scale + offset

    def _encode(self, x: Tensor) -> Codes:
        """Integers 0 to 2**b - 1 with offset -1; one bit gives -1 and +1 with the mean as scale."""
        if self.bits == 1:
            scale = _mean_magnitude(x)
            return Codes(sign_ste(x).to(torch.int32), scale, torch.zeros_like(scale), -1, 1)
        step, scale, offset = self._grid(x)
        return Codes(to_codes(self._unit(x), step, 0, self.num_steps).to(torch.int32), scale, offset, 0, self.num_steps)


def _mean_magnitude(w: Tensor) -> Tensor:
    return w.detach().abs().mean().clamp(min=SMALLEST_STEP)


class _UnitRound(torch.autograd.Function):
    """Values of the unit interval's grid. Saves the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, num_steps: int) -> Tensor:
        ctx.save_for_backward(x, step)
        (y,) = in_tiles(lambda v, out: (_unit_codes(v, step, num_steps, out).mul_(step),), 1, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, step = ctx.saved_tensors

        def gradient(v: Tensor, g: Tensor, out: Out) -> tuple[Tensor]:
            # What the codes get, times dcode/dx: in float32 not always g again.
            return (torch.mul(g, step, out=out).div_(step).mul_(indicator(torch.eq, v, v.clamp(0.0, 1.0))),)

        return in_tiles(gradient, 1, x, grads[0])[0], None, None


def _unit_codes(x: Tensor, step: Tensor, num_steps: int, out: Out = None) -> Tensor:
    """``round(clip(x, 0, 1) / step)``."""
    return to_codes(torch.clamp(x, 0.0, 1.0, out=out), step, 0, num_steps, out=out)


class DoReFaActivation(Quantizer):
    """Activations clipped to [0, 1] (Eq. 5 and section 2.2 of the paper).

    Forward:  Q_b(clip(x, 0, 1))
    Backward: identity on [0, 1], 0 elsewhere
    Off:      clip(x, 0, 1), as the code of Zhuang et al. does
    """

    paper = "DoReFa-Net, Zhou et al., arXiv 1606.06160"
    signed = False

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        step = torch.tensor(1.0 / self.num_steps, device=x.device)
        y: Tensor = _UnitRound.apply(x, step, self.num_steps)
        return y

    def bypass(self, x: Tensor) -> Tensor:
        """Clipped, not rounded."""
        return x.clamp(0.0, 1.0)

    def _encode(self, x: Tensor) -> Codes:
        """Integers 0 to 2**b - 1 with the fixed scale 1 / (2**b - 1)."""
        step = torch.tensor(1.0 / self.num_steps, device=x.device)
        codes = _unit_codes(x, step, self.num_steps)
        return Codes(codes.to(torch.int32), step, torch.zeros_like(step), 0, self.num_steps)
