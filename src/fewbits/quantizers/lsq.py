"""LSQ: a learned step size (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import fused, graph, native
from .base import Codes, Quantizer, QuantSpec
from .native import Bound
from .rounding import SMALLEST_STEP, positive, scaled_sign, sign_ste, to_codes
from .start import best_affine, best_step, sample
from .sums import halved_sum
from .tiles import Elementwise, Out, in_tiles, indicator, laid_like


class _LearnedStep(torch.autograd.Function):
    """Backward recomputes the codes from ``x`` instead of storing them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, step, *_tensors(low, high))
        ctx.bounds, ctx.gradient_scale = (low, high), gradient_scale
        (y,) = _elementwise(step, lambda v, out: (to_codes(v, step, low, high, out=out).mul_(step),), 1, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, step, *bounds = ctx.saved_tensors
        return *_by_operators(x, grads[0], step, bounds or ctx.bounds, ctx.gradient_scale), None, None, None


def _by_operators(
    x: Tensor, grad: Tensor, step: Tensor, bounds: Sequence[Bound], gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and of a positive ``step``."""
    low, high = bounds
    grad_x, share = _elementwise(step, lambda *of: _gradients(step, low, high, *of), 2, x, grad)
    groups = _num_groups(x, step)
    grad_step = share.sum_to_size(step.shape) if groups is None else halved_sum(share, groups).view(step.shape)
    return grad_x, grad_step * gradient_scale


class _InOnePass(torch.autograd.Function):
    """The same by whoever passes over memory once, see ``_way``; they keep the step positive and mind a gate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float, gate: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, step, gate, *_tensors(low, high))
        ctx.bounds, ctx.gradient_scale = (low, high), gradient_scale
        return _way(x).lsq(x, step, low, high, *_given(gate))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, step, gate, *bounds = ctx.saved_tensors
        grad, (low, high), scale = grads[0], bounds or ctx.bounds, ctx.gradient_scale
        if torch.compiler.is_compiling() or native.takes_gradient(grad):
            found = _way(x).lsq_backward(x, grad, step, low, high, scale, *_given(gate))
            return *found, None, None, None, None
        # Somebody wants the gradient's gradient, or many gradients at once, which operators have.
        grad_x, grad_step = _by_operators(x.float(), grad, positive(step), (low, high), scale)
        grad_step = torch.where(step > SMALLEST_STEP, grad_step, grad_step.clamp(max=0.0))
        if gate is not None:
            grad_x, grad_step = torch.where(gate, grad_x, grad), torch.where(gate, grad_step, 0.0)
        grad_x = grad_x.to(x.dtype)
        return grad_x, grad_step, None, None, None, None


def _way(x: Tensor) -> Any:
    """What computes LSQ in one pass here: a module with ``serves``, ``lsq`` and ``lsq_backward``."""
    if torch.compiler.is_compiling():
        return graph
    return fused if x.device.type in fused.DEVICES else native


def _given(gate: Tensor | None) -> list[Tensor]:
    """Eager code on a processor reads a gate before it gets here: ``native`` knows of none."""
    return [] if gate is None else [gate]


def _tensors(low: Bound, high: Bound) -> list[Tensor]:
    """Bounds that must be kept as tensors are; both are, or none."""
    return [bound for bound in (low, high) if isinstance(bound, Tensor)]


def _num_groups(x: Tensor, step: Tensor) -> int | None:
    """How many values, one behind the other in memory, share a step each; None where that is not how it is."""
    if step.numel() == 1 and step.ndim <= x.ndim:
        return 1
    is_first = step.ndim == x.ndim and 0 < step.shape[0] == step.numel() == x.shape[0]
    return x.shape[0] if is_first and torch.empty_like(x).stride(0) * x.shape[0] == x.numel() else None


def _gradients(
    step: Tensor, low: Bound, high: Bound, x: Tensor, grad: Tensor, out_x: Out, out_share: Out
) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, and what each element adds to the step's before the gradient scale."""
    scaled = x / step
    clipped = scaled.clamp(low, high)  # type: ignore[arg-type]
    inside = indicator(torch.eq, scaled, clipped)
    # Inside the range the clipped value is the value itself; outside, round() leaves the whole bound alone:
    # so round(clipped) - clipped * inside is round(v/s) - v/s, -Q_N or +Q_P.
    slope = clipped.round().sub_(clipped.mul_(inside))
    return torch.mul(grad, inside, out=out_x), torch.mul(grad, slope, out=out_share)


def _elementwise(step: Tensor, function: Elementwise, num_results: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In tiles, where one step serves all elements and nobody wants its gradient from them."""
    if step.ndim or (torch.is_grad_enabled() and step.requires_grad):
        laid = tensors if torch.compiler.is_compiling() else [laid_like(tensor, tensors[0]) for tensor in tensors]
        return function(*laid, *[None] * num_results)
    return in_tiles(function, num_results, *tensors)


def lsq(x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float = 1.0) -> Tensor:
    """Quantize with a learned step (Eqs. 1 to 3 of the paper).

    Forward:  step * round(clip(x / step, low, high))
    Backward: d/dx = 1 where low <= x/step <= high, else 0
              d/dstep = round(x/step) - x/step inside, low below, high above; times ``gradient_scale``

    Args:
        x: values, any shape, float32.
        step: 0-d or broadcasting against ``x``; kept positive, see ``positive``.
        low: smallest code, -Q_N.
        high: largest code, Q_P.
        gradient_scale: 1 / sqrt(N Q_P), N the number of values that share a step (without the batch).

    >>> x = torch.tensor([-1.0, 0.3, 0.8, 5.0], requires_grad=True)
    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> y = lsq(x, step, 0, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist(), round(step.grad.item(), 4)
    ([0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 1.0, 0.0], 3.8)
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
    if _fits_one_pass(x, step, low, high):
        return _in_one_pass(x, step, low, high, gradient_scale, None)
    y: Tensor = _LearnedStep.apply(x, positive(step), low, high, gradient_scale)
    return y


def _fits_one_pass(x: Tensor, step: Tensor, low: Bound, high: Bound) -> bool:
    bounds = _tensors(low, high)
    if x.numel() == 0 or any(bound.ndim for bound in bounds) or _num_groups(x, step) is None:
        return False
    return bool(_way(x).serves(x, step, *bounds))


def _in_one_pass(
    x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: float, gate: Tensor | None
) -> Tensor:
    y: Tensor = _InOnePass.apply(x, step, low, high, gradient_scale, gate)
    return y


class _LSQ(Quantizer):
    """What weights and activations share: a grid, and one pass that knows the gate."""

    step: nn.Parameter

    def _grid(self, x: Tensor) -> tuple[Tensor, Bound, Bound, float]:
        """Step, smallest and largest code, gradient scale."""
        raise NotImplementedError

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the class."""
        return lsq(x, *self._grid(x))

    def forward(self, x: Tensor) -> Tensor:
        """See the base; eager code on a processor has read the gate, a compiled graph leaves it to the pass."""
        if self._reads_buffers():
            # Half-precision values as they are: widened, they would be kept at twice their size.
            is_taken = x.dtype != torch.float32 and _fits_one_pass(x, self._grid(x)[0], 0, 1) and bool(self.enabled)
            return self.fake_quantize(x) if is_taken else super().forward(x)
        step, low, high, gradient_scale = self._grid(x)
        if not _fits_one_pass(x, step, low, high):
            return super().forward(x)
        is_open = self.stays_open and torch.compiler.is_compiling()
        return _in_one_pass(x, step, low, high, gradient_scale, None if is_open else self.enabled)


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

    def _grid(self, x: Tensor) -> tuple[Tensor, Bound, Bound, float]:
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

    def _grid(self, x: Tensor) -> tuple[Tensor, Bound, Bound, float]:
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
