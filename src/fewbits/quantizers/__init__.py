"""Quantizers: tensors in, tensors on a grid out. One paper, one file; a new one is a line in ``METHODS``."""

from __future__ import annotations

from dataclasses import dataclass

from ..names import unknown_name
from .base import Codes, Engine, Quantizer, QuantSpec, check_bits
from .dorefa import DoReFaActivation, DoReFaWeight
from .ewgs import EWGSActivation, EWGSWeight
from .frozen import FrozenMinMax
from .lsq import LSQActivation, LSQWeight
from .minmax import MinMax
from .pact import PACTActivation
from .sign import BiRealActivation, BiRealWeight, ReActActivation, Sign, XNORActivation, XNORWeight


@dataclass(frozen=True)
class Method:
    """The two quantizers of a method and the widths that it is defined for."""

    weight: type[Quantizer]
    activation: type[Quantizer]
    bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)


METHODS: dict[str, Method] = {
    "lsq": Method(LSQWeight, LSQActivation),
    "dorefa": Method(DoReFaWeight, DoReFaActivation),
    "pact": Method(DoReFaWeight, PACTActivation),
    "ewgs": Method(EWGSWeight, EWGSActivation),
    "minmax": Method(MinMax, MinMax),
    "minmax-frozen": Method(FrozenMinMax, FrozenMinMax, bits=(2, 3, 4, 5, 6, 7, 8)),
    "sign": Method(Sign, Sign, bits=(1,)),
    "xnor": Method(XNORWeight, XNORActivation, bits=(1,)),
    "bireal": Method(BiRealWeight, BiRealActivation, bits=(1,)),
    "react": Method(BiRealWeight, ReActActivation, bits=(1,)),
}


def build(spec: QuantSpec, num_channels: int, channel_dim: int) -> Quantizer:
    """Make the quantizer of ``spec``.

    Args:
        spec: method, bits, role.
        num_channels: output channels of a weight; channels of an activation.
        channel_dim: where the channels are: 0 for weights, 1 for maps, -1 for tokens.

    Raises:
        ValueError: the method is unknown, or not defined for these bits or this granularity.
    """
    if spec.method not in METHODS:
        raise ValueError(unknown_name("method", spec.method, METHODS))
    method = METHODS[spec.method]
    if spec.bits not in method.bits:
        raise ValueError(
            f"method {spec.method!r} works on {_listed(method.bits)} bit, got bits={spec.bits}; "
            "use lsq, dorefa, pact or ewgs for 2 to 8 bits"
        )
    if spec.granularity == "channel" and spec.method != "lsq":
        raise ValueError(f"granularity 'channel' is there for method lsq, got method {spec.method!r}; use 'tensor'")
    return (method.weight if spec.role == "weight" else method.activation)(spec, num_channels, channel_dim)


def _listed(bits: tuple[int, ...]) -> str:
    return ", ".join(str(b) for b in bits)


__all__ = ["METHODS", "Codes", "Engine", "Method", "QuantSpec", "Quantizer", "build", "check_bits"]
