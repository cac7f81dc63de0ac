"""What runs in one forward pass: which layer multiplies how much, and where two activations meet.

Seen from below, at PyTorch's dispatcher: whatever a model's code looks like, its multiplications pass there. Each value
is marked as it is made: it depends on the image (an activation), or on a named parameter, or on neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..quantizers import Quantizer
from ..quantizers.base import Codes

LAYERS = (nn.Conv2d, nn.Linear)

# Where the two factors stand among the operator's arguments.
_FACTORS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "baddbmm": (1, 2),
    "convolution": (0, 1),
    "mul": (0, 1),
    "mul_": (0, 1),
}
_ATTENTION = "_scaled_dot_product"
_ACTIVATION = ""
"""The mark of values that depend on the image; no parameter has this name."""


@dataclass
class Call:
    """What one module did for one image.

    Args:
        input_shape: of the first call, without the batch.
        output_shape: likewise.
        calls: how often it ran; a shared module runs more than once.
        order: place among all modules, by first call.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int
    order: int


@dataclass
class Seen:
    """What one forward pass showed, for one image.

    Args:
        calls: by qualified name, of modules that take and give a tensor.
        macs: multiply-accumulates with a weight, by the qualified name of the layer, or of the module that owns it.
        without_call: those of them that happened while their module was not called (functional use of its weight).
        products: (operation, module that it stands in) -> (times, multiplications) where both factors are activations.
        grids: codes that activation quantizers gave on the example.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    without_call: dict[str, int] = field(default_factory=dict)
    products: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    grids: dict[str, Codes] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, image: Tensor, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.stack: list[tuple[str, nn.Module]] = []
        # Views share storage, so marks on storages survive views and writes in place. Parameters of a mapped
        # file may share one storage: those are known by their own address.
        named = [*model.named_parameters(), *model.named_buffers()]
        self.parameters = {t.data_ptr(): name for name, t in named if t.numel()}
        self.marks: dict[int, str | None] = {t.untyped_storage().data_ptr(): name for name, t in named if t.numel()}
        self.marks[image.untyped_storage().data_ptr()] = _ACTIVATION

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        inside_quantizer = any(isinstance(module, Quantizer) for _, module in self.stack)
        if not inside_quantizer and (operation in _FACTORS or operation.startswith(_ATTENTION)):
            self._multiply(operation, args, output)
        marks = [self._mark(t) for t in tree_leaves((args, dict(kwargs or {}))) if isinstance(t, Tensor)]
        mark = _ACTIVATION if _ACTIVATION in marks else next((m for m in marks if m is not None), None)
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.numel():
                self.marks[t.untyped_storage().data_ptr()] = mark
        return output

    def _mark(self, t: Tensor) -> str | None:
        if not t.numel():
            return None
        mark = self.marks.get(t.untyped_storage().data_ptr())
        return mark if mark in (None, _ACTIVATION) else self.parameters.get(t.data_ptr(), mark)

    def _multiply(self, operation: str, args: tuple[Any, ...], output: Any) -> None:
        here = self.stack[-1][0] if self.stack else ""
        if operation.startswith(_ATTENTION):
            query, key, value = args[:3]
            pairs = query.numel() // query.shape[-1] * key.shape[-2]
            macs = pairs * (query.shape[-1] + value.shape[-1])
            self._add_product("scaled_dot_product_attention", here, macs)
            return
        factors = tuple(args[i] for i in _FACTORS[operation])
        if not all(isinstance(f, Tensor) for f in factors):
            return
        marks = [self._mark(f) for f in factors]
        if marks == [_ACTIVATION, _ACTIVATION]:
            self._add_product(operation.rstrip("_"), here, _num_macs(operation, factors, args, output))
        elif _ACTIVATION in marks and not operation.startswith("mul"):
            weight = next(mark for mark in marks if mark != _ACTIVATION)
            owner, is_called = self._owner(weight)
            macs = _num_macs(operation, factors, args, output)
            self.seen.macs[owner] = self.seen.macs.get(owner, 0) + macs
            if not is_called:
                self.seen.without_call[owner] = self.seen.without_call.get(owner, 0) + macs

    def _owner(self, weight: str | None) -> tuple[str, bool]:
        """Whose multiplication this is: the layer that runs, or else the module that the weight belongs to."""
        name, module = self.stack[-1] if self.stack else ("", None)
        if isinstance(module, LAYERS):
            return name, True
        owner = name if weight is None else weight.rpartition(".")[0]
        return owner, any(owner == running for running, _ in self.stack)

    def _add_product(self, operation: str, where: str, macs: int) -> None:
        times, before = self.seen.products.get((operation, where), (0, 0))
        self.seen.products[operation, where] = (times + 1, before + macs)


def _num_macs(operation: str, factors: tuple[Tensor, ...], args: tuple[Any, ...], output: Tensor) -> int:
    left, right = factors
    if operation == "convolution":
        is_transposed = bool(args[6])
        return (left if is_transposed else output).numel() * (right.numel() // right.shape[0])
    if operation.startswith("mul"):
        return output.numel()
    return output.numel() * left.shape[-1]


def observe(model: nn.Module, example: object) -> Seen:
    """Run ``model`` on the first image of ``example`` and note what happens; mode and state stay as they were.

    Args:
        model: float or quantized; on any device.
        example: images, N x C x H x W.

    Raises:
        ValueError: the example is no batch of images, or the model does not run on it.
    """
    if not isinstance(example, Tensor) or example.ndim != 4 or len(example) == 0:
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be images N x C x H x W with N at least 1, got {got}")
    place = next(model.parameters(), example)
    # A copy: marks go to storages, and the example may share its own with anything.
    image = example[:1].detach().to(place.device, copy=True)
    seen = Seen()
    watch = _Watch(model, image, seen)
    modes = [(module, module.training) for module in model.modules()]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with _hooks(model, watch):
        try:
            # The fast path runs whole layers as one operator, out of sight.
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            with torch.no_grad(), watch:
                model(image)
        except Exception as error:  # whatever a stranger's forward raises
            raise ValueError(
                f"model {type(model).__name__} does not run on an example of shape {tuple(image.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
            for module, mode in modes:
                module.training = mode
    return seen


@contextmanager
def _hooks(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """The stack of running modules, and the shapes that they take and give."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(name, watch)))
        handles.append(module.register_forward_hook(_leave(name, watch), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(name: str, watch: _Watch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        watch.stack.append((name, module))
        if isinstance(module, Quantizer) and module.spec.role == "activation" and args:
            watch.seen.grids.setdefault(name, module.encode(args[0]))
        shape = _of_one_image(args[0]) if args and isinstance(args[0], Tensor) else ()
        call = watch.seen.calls.setdefault(name, Call(shape, (), 0, len(watch.seen.calls)))
        call.calls += 1

    return enter


def _leave(name: str, watch: _Watch) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.stack.pop()
        call = watch.seen.calls[name]
        if not call.output_shape and isinstance(output, Tensor):
            call.output_shape = _of_one_image(output)

    return leave


def _of_one_image(x: Tensor) -> tuple[int, ...]:
    """Without the batch of one; windows of one image stand in front and stay."""
    return tuple(x.shape[1:]) if x.ndim > 1 and x.shape[0] == 1 else tuple(x.shape)
