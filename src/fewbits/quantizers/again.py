"""Quantizing again in the backward pass, instead of keeping what the forward pass quantized.

A convolution keeps its quantized input for the gradient of its weight, beside the input itself, which the quantizer
keeps for its own. The one is made of the other in a pass over memory: half of what a step keeps is not needed. The same
goes for quantized weights, and for a stream's values that the quantizer of a layer reads.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as modules


class QuantizingAgain:
    """Within it, autograd keeps what a quantizer took in place of what it gave, wherever ``keeping_input`` was called.

    For one forward pass of eager code; the backward pass may come later. Values and gradients are the same, bit for
    bit. A value that is changed in place between the two is an error, as it is without; so is a quantizer whose state
    was changed, which without may matter to nobody.

    >>> x, weight = torch.tensor([-0.2, 1.5]).requires_grad_(), torch.ones(2).requires_grad_()
    >>> with QuantizingAgain():
    ...     y = keeping_input(nn.Hardshrink(), x) * weight
    >>> y.sum().backward()
    >>> weight.grad.tolist()
    [0.0, 1.5]
    """

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}
        self._packed: set[int | None] = set()
        self._contexts = ExitStack()

    def __enter__(self) -> Self:
        self._contexts.enter_context(saved_tensors_hooks(self._keep, lambda kept: kept.value()))
        _active.contexts.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.close()
        _active.contexts.remove(self)
        self._made.clear()
        if error is not None and "saved tensor hooks" in str(error):
            error.add_note("fewbits packs what autograd saves; train with recompute=False (--no-recompute)")

    def call(self, quantizer: nn.Module, x: Tensor, is_cast: bool) -> Tensor:
        """``quantizer(x)``, remembered if that saves memory: if the quantizer keeps ``x`` for itself anyway."""
        self._packed.clear()
        y: Tensor = quantizer(x)
        place = _place(x)
        if place is None or place not in self._packed:
            return y
        dtype = None
        if is_cast and y.dtype == torch.float32 and torch.is_autocast_enabled(y.device.type):
            dtype = torch.get_autocast_dtype(y.device.type)
            y = y.to(dtype)
        self._remember(quantizer, dtype, x, y)
        return y

    def _remember(self, quantizer: nn.Module, dtype: torch.dtype | None, x: Tensor, y: Tensor) -> None:
        place = _place(y)
        if place is None or place == _place(x):
            return
        # Whoever lets go of y lets go of x: in a checkpointed block nobody else keeps it.
        forgotten = weakref.ref(y, lambda _: self._made.pop(place, None))
        source, autocast = self._keep(x.detach()), _autocast(y.device.type)
        self._made[place] = _Made(forgotten, y._version, quantizer, _state(quantizer), dtype, source, autocast)

    def _keep(self, tensor: Tensor) -> _Whole | _Again:
        place = _place(tensor)
        self._packed.add(place)
        made = None if place is None else self._made.get(place)
        y = None if made is None else made.y()
        # What was changed in place since is no longer what the quantizer gave.
        if made is None or y is None or y._version != made.version or tensor.dtype != y.dtype:
            return _Whole(tensor, tensor._version)
        return _Again(made, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def keeping_input(quantizer: nn.Module, x: Tensor, *, is_cast: bool = False) -> Tensor:
    """``quantizer(x)``, which the backward pass may do again; see ``QuantizingAgain``.

    Args:
        quantizer: its forward does nothing but give a value, the same each time unless ``is_repeatable`` is False.
        x: any shape.
        is_cast: whether the result goes straight into one of the operators, a convolution say, that work in the lower
            precision of autocast; the cast is then part of what is done again.
    """
    if torch.compiler.is_compiling() or not _active.contexts or not torch.is_grad_enabled() or _runs_once(quantizer):
        y: Tensor = quantizer(x)
        return y
    return _active.contexts[-1].call(quantizer, x, is_cast)


def _runs_once(quantizer: nn.Module) -> bool:
    """Whether it must not be called again: somebody would see it, or it would give something else.

    A tap keeps what it saw anyway, and must not see it twice; another hook may change it.
    """
    has_hooks = quantizer._forward_hooks or quantizer._forward_pre_hooks
    has_global_hooks = modules._global_forward_hooks or modules._global_forward_pre_hooks
    return bool(has_hooks or has_global_hooks) or not getattr(quantizer, "is_repeatable", True)


def _state(quantizer: nn.Module) -> tuple[Any, ...]:
    """What changes when a quantizer does: a ReLU's work, its bits, and how often its numbers were written."""
    numbers = (*quantizer._parameters.values(), *quantizer._buffers.values())
    is_rectifying = isinstance(vars(quantizer).get("forward"), partial)  # see training/rectifiers.py
    told = is_rectifying, getattr(quantizer, "spec", None)
    return *told, *(each._version for each in numbers if each is not None)


class _Active(threading.local):
    """The contexts of a thread, from the outermost inwards, as hooks on saved tensors are a thread's own."""

    def __init__(self) -> None:
        self.contexts: list[QuantizingAgain] = []


_active = _Active()


@dataclass(frozen=True)
class _Whole:
    """A tensor that is kept as it is."""

    tensor: Tensor
    version: int

    def value(self, is_read_again: bool = False) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed by an inplace "
                "operation after the forward pass had used it; use the operation that returns a new tensor"
            )
        return self.tensor


@dataclass
class _Made:
    """How a tensor was made.

    Args:
        y: the tensor, as long as somebody holds it.
        version: of ``y``: how often it had been changed in place.
        quantizer: that gave it.
        was: the quantizer's state then.
        dtype: that it was cast to; None as it was given.
        x: what the quantizer took.
        autocast: a context with the mixed precision of then.
        spare: ``y`` once more, for the next one who asks.
    """

    y: weakref.ref[Tensor]
    version: int
    quantizer: nn.Module
    was: tuple[Any, ...]
    dtype: torch.dtype | None
    x: _Whole | _Again
    autocast: Callable[[], AbstractContextManager[object]]
    spare: Tensor | None = None

    def again(self, is_read_again: bool) -> Tensor:
        """The values of ``y``, which stay for another reading or not."""
        y, self.spare = self.spare, None
        if _state(self.quantizer) != self.was:
            raise RuntimeError(
                "a quantizer's bits, gate or ranges were changed between a forward pass and its backward pass, which "
                "quantizes again; change them before or after both, or train "
                "with recompute=False (--no-recompute)"
            )
        if y is None:
            with torch.no_grad(), self.autocast():
                # A quantizer that reads a quantized value wants it again for its own gradient, right behind this.
                given: Tensor = self.quantizer.forward(self.x.value(is_read_again=True))
                y = given if self.dtype is None else given.to(self.dtype)
        self.spare = y if is_read_again else None
        return y


@dataclass(frozen=True)
class _Again:
    """A quantized tensor, or a view of one, that is made once more."""

    made: _Made
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def value(self, is_read_again: bool = False) -> Tensor:
        return self.made.again(is_read_again).as_strided(self.shape, self.stride, self.offset)


def _place(tensor: Tensor) -> int | None:
    """Where the memory of a plain tensor begins."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not is_plain or tensor.is_neg() or tensor.is_conj():
        return None
    return tensor.untyped_storage().data_ptr() or None


def _autocast(device: str) -> Callable[[], AbstractContextManager[object]]:
    """A context with the mixed precision of now."""
    is_on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=is_on)
