"""A sum whose bits depend on the values and their order alone, not on threads, registers or who computes it.

A learned step's gradient is one number made of millions. Written as halvings it comes out the same from PyTorch's
operators and from one pass in ``kernels.cpp``, and errors grow with the logarithm of their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2048
"""Values that are halved together; a power of two. ``kernels.cpp`` has it too."""


def halved_sum(values: Tensor, num_groups: int = 1) -> Tensor:
    """The sum of each group, in order of memory.

    Blocks of 2,048 values, the last one filled with zeros, are halved, the second half added to the first, until one
    value is left of each; then these likewise. Other devices than a CPU have their own way.

    Args:
        values: any shape; groups lie behind one another.
        num_groups: how many; it divides the number of values.

    Returns:
        ``num_groups`` sums.

    >>> halved_sum(torch.arange(6.0), 2).tolist()
    [3.0, 12.0]
    """
    flat = _in_order(values).view(num_groups, -1)
    if values.device.type != "cpu":
        return flat.sum(1)
    blocks = -(-flat.shape[1] // BLOCK)
    whole = F.pad(flat, (0, blocks * BLOCK - flat.shape[1])).view(num_groups, blocks, BLOCK)
    sums = _halved(whole)
    return _halved(F.pad(sums, (0, power_of_two(blocks) - blocks)))


def power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``.

    >>> [power_of_two(number) for number in (1, 2, 3, 5)]
    [1, 2, 4, 8]
    """
    return 1 << (number - 1).bit_length()


def _halved(values: Tensor) -> Tensor:
    """The last dimension, a power of two, to one value."""
    while values.shape[-1] > 1:
        first, second = values.chunk(2, dim=-1)
        values = first + second
    return values.squeeze(-1)


def _in_order(values: Tensor) -> Tensor:
    """Flat, as the values lie in memory where they lie densely, else as they are counted."""
    if torch.empty_like(values).stride() == values.stride():
        return values.as_strided((values.numel(),), (1,))
    return values.reshape(-1)
