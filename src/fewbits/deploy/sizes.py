"""What a network's bits come to, by one definition for every kind of file."""

from __future__ import annotations

from torch import nn

from ..convert import FLOAT_BITS, quantizer_keys
from ..layers import QuantLayer


def sizes(network: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters with each quantized weight at its bits and the others at 32, and of the float network.

    Running statistics are no parameters: an engine's file has them folded, and no theory of bits counts them.
    """
    layers = [module for module in network.modules() if isinstance(module, QuantLayer)]
    quantizers = {id(layer.weight): layer.weight_quantizer for layer in layers}
    bits = {key: made.bits for key, made in quantizers.items() if made is not None and bool(made.enabled)}
    own = quantizer_keys(network)
    parameters = dict(network.named_parameters())
    theoretical = sum(p.numel() * bits.get(id(p), FLOAT_BITS) for p in parameters.values())
    full = sum(p.numel() * FLOAT_BITS for name, p in parameters.items() if name not in own)
    return (theoretical + 7) // 8, full // 8
