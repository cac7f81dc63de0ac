"""Weights are quantized once for a step, however many micro-batches it has."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ..layers import QuantLayer


class SharedWeights:
    """Within it the quantized layers of a network share their quantized weights among micro-batches.

    All micro-batches but the last add their gradients to a copy of the quantized weight; the last one goes through the
    quantizer itself, and a hook gives it what the others have gathered. So DDP sees every parameter's gradient once,
    in the backward pass in which it expects it; and EWGS, whose gradient looks at signs, sees those of the whole step.

    They are quantized as they and their gates are at the beginning: whoever changes one of these within a forward pass
    has to do without.

    Args:
        network: with quantized layers, or around a network with them.
        num_parts: micro-batches of a step; with one there is nothing to share.
    """

    def __init__(self, network: nn.Module, num_parts: int) -> None:
        self._layers = [
            layer
            for layer in network.modules()
            if num_parts > 1 and isinstance(layer, QuantLayer) and layer.weight_quantizer is not None
        ]
        self._quantized: list[Tensor] = []
        self._gathered: list[Tensor] = []
        self._given: set[int] = set()

    def __enter__(self) -> Self:
        for layer in self._layers:
            assert layer.weight_quantizer is not None
            quantized = layer.weight_quantizer(layer.weight)
            gathered = quantized.detach().requires_grad_(quantized.requires_grad)
            layer.quantized_weight = gathered
            self._quantized.append(quantized)
            self._gathered.append(gathered)
        return self

    def last(self) -> None:
        """The next micro-batch is the last one."""
        for number, (layer, quantized) in enumerate(zip(self._layers, self._quantized, strict=True)):
            layer.quantized_weight = quantized
            if quantized.requires_grad:
                quantized.register_hook(lambda grad, number=number: self._give(number, grad))

    def _give(self, number: int, grad: Tensor) -> Tensor:
        self._given.add(number)
        gathered = self._gathered[number].grad
        return grad if gathered is None else grad + gathered

    def finish(self) -> None:
        """After the last backward pass: what the last micro-batch did not pass through still has its gradient."""
        for number, (quantized, gathered) in enumerate(zip(self._quantized, self._gathered, strict=True)):
            if number not in self._given and gathered.grad is not None:
                torch.autograd.backward(quantized, torch.zeros_like(quantized))  # the hook adds what was gathered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:
            layer.quantized_weight = None
