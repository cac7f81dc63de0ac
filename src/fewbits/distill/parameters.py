"""Which parameters of a network decay, and which have a rate of their own."""

from __future__ import annotations

from torch import nn

from ..quantizers import Quantizer


def by_kind(network: nn.Module) -> dict[tuple[str, float], list[nn.Parameter]]:
    """A network's trainable parameters by kind and by the factor on the rate that their method asks for.

    Kinds are weights, those that never decay, quantizers', and quantizers' that decay.
    """
    split: dict[tuple[str, float], list[nn.Parameter]] = {}
    of_quantizers = {
        id(parameter): ("quantizer_decayed" if name in quantizer.decayed else "quantizers", quantizer.rate)
        for quantizer in network.modules()
        if isinstance(quantizer, Quantizer)
        for name, parameter in quantizer.named_parameters()
    }
    for parameter in network.parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim > 1 else "no_decay"
            split.setdefault(of_quantizers.get(id(parameter), (kind, 1.0)), []).append(parameter)
    # In one order whatever stands first in a network: a checkpoint's optimizer state goes by it.
    order = ("weights", "no_decay", "quantizers", "quantizer_decayed")
    return dict(sorted(split.items(), key=lambda entry: (order.index(entry[0][0]), entry[0][1])))
