"""LSQ: a learned step size (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Codes, Quantizer, QuantSpec
from .learned_step import fits_one_pass, in_one_pass, lsq
from .native import Bound
from .rounding import positive, scaled_sign, sign_ste, to_codes
from .start import best_affine, best_step, sample


class _LSQ(Quantizer):
    """What weights and activations share: a grid, and one pass that knows the gate."""

    step: nn.Parameter

    def grid(self, x: Tensor) -> tuple[Tensor, Bound, Bound, float]:
        """Step, smallest and largest code, gradient scale."""
        raise NotImplementedError

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return lsq(x, *self.grid(x))

    def forward(self, x: Tensor) -> Tensor:
        """See the base; eager code on a processor has read the gate, a compiled graph leaves it to the pass."""
        if self._reads_buffers():
            # Half-precision values as they are: widened, they would be kept at twice their size.
            is_taken = x.dtype != torch.float32 and fits_one_pass(x, self.grid(x)[0], 0, 1) and bool(self.enabled)
            return self.fake_quantize(x) if is_taken else super().forward(x)
        step, low, high, gradient_scale = self.grid(x)
        if not fits_one_pass(x, step, low, high):
            return super().forward(x)
        is_open = self.stays_open and torch.compiler.is_compiling()
        return in_one_pass(x, step, low, high, gradient_scale, None if is_open else self.enabled)


class LSQWeight(_LSQ):
    """Signed weights, symmetric around zero: codes from -2**(b-1) to 2**(b-1) - 1.

    One bit is a special case of ours, for the paper's grid has no level above zero there: ``step * sign(w)``, with
    d/dw = 1, d/dstep = sum(g sign(w)) / sqrt(N), and mean|w| as the start.

    At 8 bits the code -128 is left out (ours): a batch norm with a negative factor folds into the weights by a change
    of sign, and +128 does not fit into eight bits.

    Differs from the paper: the start minimises the squared error; ``start="paper"`` is 2 mean|w| / sqrt(Q_P).
    """

    paper = "LSQ, Esser et al., ICLR 2020, arXiv 1902.08153"
    needs_data = True
    steady = ("step",)

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.step = nn.Parameter(torch.ones(num_channels if spec.granularity == "channel" else ()))

    @property
    def low(self) -> int:
        """Smallest code, -Q_N."""
        return {1: -1, 8: -127}.get(self.bits, -(2 ** (self.bits - 1)))

    @property
    def high(self) -> int:
        """Largest code, Q_P; 1 for one bit."""
        return max(int(2 ** (self.bits - 1)) - 1, 1)

    def _step(self, x: Tensor) -> Tensor:
        return self.step.view(self._per_channel(x)) if self.step.ndim else self.step

    def grid(self, x: Tensor) -> tuple[Tensor, Bound, Bound, float]:
        return self._step(x), self.low, self.high, (self._num_shared(x) * self.high) ** -0.5

    def _num_shared(self, x: Tensor) -> int:
        """N, the number of weights that share a step."""
        return x.numel() // self.step.numel()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.bits == 1:
            return scaled_sign(
                x, _scale_gradient(positive(self._step(x)), self._num_shared(x) ** -0.5), clip=float("inf")
            )
        return super().fake_quantize(x)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return Quantizer.forward(self, x) if self.bits == 1 else super().forward(x)

    def _encode(self, x: Tensor) -> Codes:
        """Integers that an engine multiplies as they are; one bit gives -1 and +1."""
        step = positive(self._step(x))
        codes = sign_ste(x) if self.bits == 1 else to_codes(x, step, self.low, self.high)
        return Codes(codes.to(torch.int32), step, torch.zeros_like(step), self.low, self.high)

    def _calibrate(self, x: Tensor) -> None:
        groups = x.reshape(self.step.numel(), -1)
        if self.bits == 1:
            step = groups.abs().mean(1)
        elif self.spec.start == "paper":
            step = 2 * groups.abs().mean(1) / self.high**0.5
        else:
            step = best_step(groups, self.low, self.high)
        self.step.copy_(torch.where(step > 0, step, 1.0).view_as(self.step))


class LSQActivation(_LSQ):
    """Activations: codes from 0 to 2**b - 1, or an affine grid where the data go below zero.

    Calibration decides (ours; the paper's grid is unsigned only): with a negative minimum a whole ``zero_point``
    is fixed, codes run from -zero_point to 2**b - 1 - zero_point, and zero stays exactly a level.
    """

    paper = "LSQ, Esser et al., ICLR 2020, arXiv 1902.08153"
    needs_data = True
    steady = ("step",)
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__(spec, num_channels, channel_dim)
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    def grid(self, x: Tensor) -> tuple[Tensor, Bound, Bound, float]:
        features = x.numel() // x.shape[0] if x.ndim > 1 else x.numel()
        low: Bound = -int(self.zero_point) if self._reads_buffers() else -self.zero_point
        return self.step, low, low + self.num_steps, (features * self.num_steps) ** -0.5

    def _encode(self, x: Tensor) -> Codes:
        """Integers with a whole zero point: an engine's unsigned 8-bit type takes them as they are."""
        step = positive(self.step)
        low = -int(self.zero_point)
        codes = to_codes(x, step, low, low + self.num_steps)
        return Codes(codes.to(torch.int32), step, torch.zeros_like(step), low, low + self.num_steps)

    def _calibrate(self, x: Tensor) -> None:
        signed = bool(x.min() < 0)
        if self.spec.start == "paper" and not signed:
            step, zero_point = 2 * x.abs().mean() / self.num_steps**0.5, 0
        elif signed:
            step, zero_point = best_affine(sample(x), self.num_steps)
        else:
            step, zero_point = best_step(sample(x)[None], 0, self.num_steps)[0], 0
        self.step.copy_(step if step > 0 else torch.tensor(1.0))
        self.zero_point.fill_(zero_point)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` forward, ``factor * g`` backward."""
    return x.detach() + (x - x.detach()) * factor
