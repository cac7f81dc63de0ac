"""Elementwise work tile by tile: what a tile needs stays in the processor's cache, so that memory is passed over once.

PyTorch runs an expression of eight operators as eight passes over memory, which is what makes a quantizer slow on a
CPU. Every element still goes through the same operators, so results are the same bits. A compiled graph fuses such an
expression by itself, and other devices have their own ways: there the function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 16
"""Elements of a tile for each thread: 256 kB in float32, so that a few of them fit a core's second-level cache."""

Out = Tensor | None
"""Where a function writes a result: into this tensor, or, for None, into a new one, as ``out=`` of PyTorch does."""

Elementwise = Callable[..., tuple[Tensor, ...]]


def in_tiles(function: Elementwise, num_results: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors, *outs)``, computed tile by tile where that is faster.

    Args:
        function: takes tensors of one shape and ``num_results`` places (see ``Out``), returns its results, each element
            from the elements at its place alone; it may change what it made itself, never what it was given.
        num_results: how many it returns, of the tensors' shape and type.
        tensors: of one shape.

    >>> def double_and_square(v, double, square):
    ...     return torch.add(v, v, out=double), torch.mul(v, v, out=square)
    >>> x = torch.arange(6.0).view(2, 3)
    >>> doubled, squared = in_tiles(double_and_square, 2, x)
    >>> doubled.tolist(), squared.shape
    ([[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]], torch.Size([2, 3]))
    """
    like = tensors[0]
    needs_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    layout = None if needs_graph else _cuttable(like)
    if layout is None:
        others = tensors[1:] if torch.compiler.is_compiling() else [laid_like(tensor, like) for tensor in tensors[1:]]
        return function(like, *others, *[None] * num_results)
    results = tuple(torch.empty_like(like, memory_format=layout) for _ in range(num_results))
    given = (like, *(tensor.contiguous(memory_format=layout) for tensor in tensors[1:]))
    for parts in zip(*(_cut(tensor) for tensor in (*given, *results)), strict=True):
        function(*parts)
    return results


def count(compare: Callable[..., Tensor], x: Tensor, other: Tensor) -> Tensor:
    """How many elements fulfil ``compare(x, other)`` (``torch.eq``, say), ``other`` 0-d; int64.

    >>> count(torch.eq, torch.tensor([0.0, 1.0, -0.0]), torch.tensor(0.0)).item()
    2
    """
    if _cuttable(x) is None:
        return compare(x, other).sum()
    # Sums of ones in float32 are several times as fast as those of booleans, and exact below 2**24: within a tile.
    return torch.stack([indicator(compare, part, other).sum() for part in _cut(x)]).sum(dtype=torch.int64)


def indicator(compare: Callable[..., Tensor], x: Tensor, other: Any, out: Out = None) -> Tensor:
    """1 where ``compare(x, other)`` (``torch.ge``, say), else 0, in the type of ``x``.

    A product with a boolean mask takes a CPU five times as long as one with this.

    >>> indicator(torch.ge, torch.tensor([-1.0, 0.0]), 0).tolist()
    [0.0, 1.0]
    """
    if torch.compiler.is_compiling():
        return compare(x, other).to(x.dtype)
    return compare(x, other, out=torch.empty_like(x) if out is None else out)


def laid_like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` in the order in which a result for ``other`` lies in memory."""
    if tensor.stride() == other.stride():
        return tensor
    place = torch.empty_like(other, dtype=tensor.dtype)
    return tensor if tensor.stride() == place.stride() else place.copy_(tensor)


def _size() -> int:
    """Elements of a tile."""
    return TILE * torch.get_num_threads()


def _cuttable(x: Tensor) -> torch.memory_format | None:
    """The memory format in which ``x`` is dense, if there is one and tiles are faster."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < 2 * _size():
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None  # a gradient's gradient: what is written into a tile has none
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _cut(x: Tensor) -> tuple[Tensor, ...]:
    """Tiles of a dense tensor, in the order of memory."""
    return x.as_strided((x.numel(),), (1,)).split(_size())
