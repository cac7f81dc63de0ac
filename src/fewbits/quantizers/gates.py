"""A promise to compiled graphs: the gates of these quantizers are open.

A graph reads gates as tensors, so that closing one never recompiles; then it must have both, what a quantizer gives and
what it was given. Whoever knows that no gate closes says so, and gets a graph without gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .base import Quantizer


@contextmanager
def promised_open(network: nn.Module, promise: bool = True) -> Iterator[None]:
    """Within it compiled graphs of ``network`` rely on ``promise``; with another one there is a second graph."""
    found = [module for module in network.modules() if promise and isinstance(module, Quantizer)]
    for quantizer in found:
        quantizer.stays_open = True
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.stays_open = False
