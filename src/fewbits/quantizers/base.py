"""What a quantizer is: a tensor in, the same shape out, on at most ``2**bits`` levels per scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Role = Literal["weight", "activation"]
Granularity = Literal["tensor", "channel"]
Start = Literal["data", "paper"]
Engine = Literal["integer", "shifted", "transformed", "float"]


def check_bits(bits: object, name: str = "bits") -> int:
    """Return ``bits`` if it is a whole number from 1 to 8, else raise an error that says what is allowed."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be a whole number from 1 to 8, got {bits!r} ({type(bits).__name__})")
    if not 1 <= bits <= 8:
        raise ValueError(
            f"{name} must be between 1 and 8, got {bits}; for full precision leave the layer out of the plan "
            "(keep=...) or pass 32 to quantize()"
        )
    return bits


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. Frozen data: prints, compares, is saved with a run.

    Args:
        method: a key of ``fewbits.quantizers.METHODS``.
        bits: 1 to 8.
        role: what is quantized, a layer's ``"weight"`` or its input ``"activation"``.
        granularity: one scale for the ``"tensor"``, or one for each output ``"channel"`` (weights only).
        start: where ranges start: from the ``"data"`` (our default) or as the ``"paper"`` says.
        fixed: whether the bits stay when a schedule moves the network's bits (first and last layer, residual streams).
    """

    method: str
    bits: int
    role: Role
    granularity: Granularity = "tensor"
    start: Start = "data"
    fixed: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name, value, allowed in (
            ("role", self.role, ("weight", "activation")),
            ("granularity", self.granularity, ("tensor", "channel")),
            ("start", self.start, ("data", "paper")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.role == "activation" and self.granularity == "channel":
            raise ValueError(
                "granularity must be 'tensor' for an activation, got 'channel'; engines have one activation scale"
            )


@dataclass(frozen=True)
class Codes:
    """A quantized tensor as integers: ``decode()`` is ``integers * scale + offset``.

    Args:
        integers: int32, any shape, from ``low`` to ``high``.
        scale: float32, positive, broadcasts against ``integers``.
        offset: float32, broadcasts against ``integers``.
        low: smallest integer of the grid; below zero for symmetric weights and for signed activations.
        high: largest integer of the grid.
    """

    integers: Tensor
    scale: Tensor
    offset: Tensor
    low: int
    high: int

    def decode(self) -> Tensor:
        """Return the float32 values, bit for bit those of the quantizer's forward pass."""
        return self.integers.to(torch.float32) * self.scale + self.offset


class Quantizer(nn.Module, ABC):
    """A tensor goes in, the same shape comes out on a grid.

    ``forward(x)`` equals ``encode(x).decode()`` bit for bit. The buffer ``enabled`` is a gate: closed, the output is
    ``bypass(x)``; switching it neither recompiles a compiled network nor loses state. The buffer ``calibrated`` says
    whether ranges were set from real data, and is saved.

    Args:
        spec: what to do.
        num_channels: output channels of a weight; channels of an activation.
        channel_dim: where the channels are: 0 for weights, 1 for images and maps, -1 for tokens.
    """

    paper: ClassVar[str]
    """Where the method is published."""

    signed: ClassVar[bool] = True
    """Whether values below zero are represented; False means that calibration refuses them with a hint."""

    needs_data: ClassVar[bool] = False
    """Whether calibration has anything to set."""

    steady: ClassVar[tuple[str, ...]] = ()
    """Names of positive parameters that the training loop lets change by a tenth at a time (steps, clipping levels)."""

    decayed: ClassVar[tuple[str, ...]] = ()
    """Names of parameters whose weight decay belongs to the method (PACT's alpha)."""

    is_repeatable: ClassVar[bool] = True
    """Whether the same input gives the same values a second time: False for a quantizer that draws random numbers."""

    rate: ClassVar[float] = 1.0
    """Factor on the learning rate of the method's own parameters, where its paper has another one for them."""

    stays_open: bool
    """Whether compiled graphs may rely on an open gate; see ``gates.promised_open``."""

    enabled: Tensor
    calibrated: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int, channel_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.stays_open = False  # in each: graphs are guarded by what an object has, not by what its class has
        self.register_buffer("enabled", torch.tensor(True))
        self.register_buffer("calibrated", torch.tensor(False))

    @property
    def bits(self) -> int:
        """Bits of each code."""
        return self.spec.bits

    @property
    def num_steps(self) -> int:
        """Steps between the smallest and the largest level: ``2**bits - 1``."""
        return int(2**self.spec.bits - 1)

    @property
    def engine(self) -> Engine:
        """What an inference engine can make of the codes.

        ``"integer"``: they are multiplied as they are; ``"shifted"``: after ``2q - (2**bits - 1)``, for grids without a
        zero level; ``"transformed"``: the input is shifted first; ``"float"``: ranges change with every batch, so
        there is nothing fixed to ship.
        """
        return "integer"

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` (any shape; computed and returned in float32), or pass it on while the gate is closed."""
        x = x.float()
        is_open = self.stays_open if torch.compiler.is_compiling() else self._reads_buffers() and bool(self.enabled)
        if is_open:
            return self.fake_quantize(x)
        return torch.where(self.enabled, self.fake_quantize(x), self.bypass(x))

    def _reads_buffers(self) -> bool:
        """Whether the value of a buffer may decide what is computed.

        On a CPU it costs nothing to read, and saves work; elsewhere it would wait for the device, and in a compiled
        graph it would be baked in.
        """
        return self.enabled.device.type == "cpu" and not torch.compiler.is_compiling()

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """The quantized values of ``x``, with the method's gradient."""

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Quantize ``x`` (any shape; computed in float32) to integers, whether the gate is open or not."""
        return self._encode(x.detach().float())

    @abstractmethod
    def _encode(self, x: Tensor) -> Codes:
        """The codes of ``x``, which is float32; called without gradients."""

    def bypass(self, x: Tensor) -> Tensor:
        """What "not quantized" means for this method: the identity, unless its paper clips."""
        return x

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the ranges from real values ``x``; recorded in ``calibrated``.

        Raises:
            ValueError: ``x`` is empty, or has values that are not finite or that the method cannot represent.
        """
        x = x.detach().float()
        if x.numel() == 0:
            raise ValueError(f"calibration data is empty: its shape is {tuple(x.shape)}; pass at least one real batch")
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise ValueError(
                f"{self.spec.role} to calibrate on holds {bad} of {x.numel()} values that are NaN or infinite"
            )
        if not self.signed and bool(x.min() < 0):
            raise ValueError(
                f"{type(self).__name__} represents values from 0 up, but its input goes down to {float(x.min()):.4g}; "
                "use method lsq or ewgs for this layer, or put a ReLU in front of it"
            )
        self._calibrate(x)
        self.calibrated.fill_(True)

    def _calibrate(self, x: Tensor) -> None:
        return

    def set_bits(self, bits: int) -> None:
        """Change the bit width in place. Parameters stay as they are; a changed width has to be calibrated anew."""
        check_bits(bits)
        if bits != self.spec.bits:
            self.spec = replace(self.spec, bits=bits)
            self.calibrated.fill_(False)

    def extra_repr(self) -> str:
        """The specification, for ``print(model)``."""
        return f"{self.spec.method}, {self.spec.bits} bits, {self.spec.granularity}"

    def _per_channel(self, x: Tensor) -> list[int]:
        """The shape of a per-channel parameter that broadcasts against ``x``."""
        shape = [1] * x.ndim
        shape[self.channel_dim] = self.num_channels
        return shape
