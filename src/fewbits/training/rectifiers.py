"""ReLUs whose result nobody but a quantizer reads are computed by that quantizer, in eager steps on a processor.

Three passes over memory become one forward and two become one backward, with the same bits but for the sign of zeros.
The network's modules stay what they are: for the time of a step a ReLU passes on what it took, and its quantizer knows.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.utils._pytree import tree_leaves

from ..layers import QUANTIZED, QuantLayer
from ..quantizers import Quantizer, native
from ..quantizers.lsq import LSQActivation
from ..quantizers.rectified import CEILINGS, quantize_rectified
from ..streams import first_reader

KNOWN = {"fewbits", "timm", "torch", "torchvision"}
"""Packages whose code does what a trace of it shows."""

_NEW_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.conv2d, F.linear, operator.add, torch.add}
_NEW_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.Conv2d, nn.Linear)
"""What gives memory of its own."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Rectifier:
    """A ReLU and the quantizer that alone reads what it gives.

    Args:
        relu: of a type in ``CEILINGS``.
        quantizer: of the input of ``layer``, or the stream's on the ReLU itself.
        layer: that reads the value; None where the stream's quantizer does.
        witnesses: modules that take or give the value on its way, and, where the ReLU works in place, what it took:
            their hooks would see it.
    """

    relu: nn.Module
    quantizer: LSQActivation
    layer: QuantLayer | None
    witnesses: tuple[nn.Module, ...]

    def is_free(self) -> bool:
        """Whether now nobody else looks on, nobody has changed what is computed, and the quantizer is at work."""
        reader = first_reader(self.relu) if self.layer is None else self.layer.input_quantizer
        if reader is not self.quantizer or not bool(self.quantizer.enabled):
            return False
        involved = (self.relu, self.quantizer, *self.witnesses)
        if any("forward" in vars(each) for each in involved):
            return False
        if any(getattr(each, hooks) for each in involved for hooks in _BACKWARD_HOOKS):
            return False
        return not any(getattr(each, hooks) for each in (self.quantizer, *self.witnesses) for hooks in _HOOKS)


@contextmanager
def rectified_by_quantizers(rectifiers: Iterable[Rectifier]) -> Iterator[None]:
    """Within it the quantizers do what their ReLUs did; for a forward pass and its backward pass."""
    is_watched = any(getattr(modules, f"_global{hooks}") for hooks in (*_HOOKS, *_BACKWARD_HOOKS))
    found = [each for each in rectifiers if not is_watched and each.is_free()]
    try:
        for each in found:
            each.relu.forward = _pass_on
            each.quantizer.forward = partial(quantize_rectified, each.quantizer, each.relu)  # type: ignore[method-assign]
        yield
    finally:
        for each in found:
            vars(each.relu).pop("forward", None)
            vars(each.quantizer).pop("forward", None)


def _pass_on(x: Tensor) -> Tensor:
    return x


def find(network: nn.Module) -> tuple[Rectifier, ...]:
    """The ReLUs of ``network`` that can be left to a quantizer.

    None where its forward pass cannot be traced, or runs code from elsewhere than ``KNOWN``: a trace sees neither what
    a module keeps as an attribute, nor branches on an argument, a type or a flag, and such code may have them.
    """
    if not native.is_available():
        return ()
    tracer = _Tracer()
    try:
        _check_known(network)
        graph = tracer.trace(network)
    except Exception:  # whatever a stranger's forward raises when it meets a symbol; only time is lost
        return ()
    if len(graph.find_nodes(op="placeholder")) != 1:
        return ()
    names = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    pairs = filter(None, map(tracer.rectifier, dict.fromkeys(tracer.called.values())))
    return tuple(pair for pair in pairs if names[id(pair.relu)] == names[id(pair.quantizer)] == 1)


def _check_known(module: nn.Module) -> None:
    if type(module).__module__.partition(".")[0] not in KNOWN or "forward" in vars(module):
        raise ValueError(f"what {type(module).__name__} does is not known")


class _Tracer(fx.Tracer):
    """Follows a network through its own code, down to PyTorch's modules and quantized layers."""

    proxy_buffer_attributes = True  # a norm that counts its batches must not count this one

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[fx.Node, nn.Module] = {}
        """The module that gave a value, where it was not looked into."""
        self.met: dict[fx.Node, list[nn.Module]] = {}
        """All modules that took or gave a value."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantLayer | Quantizer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_known(m)
        result = super().call_module(m, m.forward, args, kwargs)  # without hooks, which expect numbers
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, fx.Proxy):
                self.met.setdefault(value.node, []).append(m)
        if self.is_leaf_module(m, self.path_of_module(m)):
            self.called[result.node] = m
        return result

    def rectifier(self, relu: nn.Module) -> Rectifier | None:
        """``relu`` and the quantizer that alone reads it, if there is one and it can do the ReLU's work."""
        nodes = [node for node, module in self.called.items() if module is relu]
        if type(relu) not in CEILINGS or len(nodes) != 1:
            return None
        node, witnesses = nodes[0], []
        taken = self._new_memory(node.args[0] if node.args else None)
        if taken is None:  # the quantizer would keep more than what it takes: all that this is a piece of
            return None
        if getattr(relu, "inplace", False):
            if any(len(each.users) != 1 for each in taken):  # who reads what it took, and would read what it gives
                return None
            witnesses = [module for each in taken for module in self.met.get(each, []) if module is not relu]
        stream = first_reader(relu)
        if stream is not None:
            return Rectifier(relu, stream, None, tuple(witnesses)) if type(stream) is LSQActivation else None
        witnesses += self.met[node]
        while len(node.users) == 1 and type(self.called.get(next(iter(node.users)))) is nn.Identity:
            (node,) = node.users
            witnesses += self.met[node]
        layer = self.called.get(next(iter(node.users))) if len(node.users) == 1 else None
        if not isinstance(layer, QuantLayer) or type(layer) not in QUANTIZED.values():
            return None
        quantizer = layer.input_quantizer if [*self.called.values()].count(layer) == 1 else None
        return Rectifier(relu, quantizer, layer, tuple(witnesses)) if type(quantizer) is LSQActivation else None

    def _new_memory(self, value: Any) -> list[fx.Node] | None:
        """``value`` under all names that its memory has had since somebody made it; None where that is not clear."""
        found = []
        while isinstance(value, fx.Node):
            found.append(value)
            if value.target in _NEW_FUNCTIONS or isinstance(self.called.get(value), _NEW_MODULES):
                return found
            is_passed_on = value.target is operator.iadd or type(self.called.get(value)) is nn.Identity
            value = value.args[0] if is_passed_on else None
        return None
