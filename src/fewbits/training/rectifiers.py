"""ReLUs whose result nobody but a quantizer reads are computed by that quantizer, in eager steps on a processor.

Three passes over memory become one forward and two become one backward, with the same bits. The network's modules stay
what they are: for the time of a step a ReLU passes on what it took, and its quantizer knows.
"""

from __future__ import annotations

import operator
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

from ..layers import QuantLayer
from ..quantizers import Quantizer
from ..quantizers.lsq import LSQActivation
from ..quantizers.rectified import CEILINGS, quantize_rectified
from ..streams import first_reader

_NEW_MEMORY = {F.batch_norm, F.layer_norm, F.group_norm, F.conv2d, F.linear, operator.add, torch.add}
_OLD_MEMORY = (nn.Identity, nn.Dropout, nn.Flatten, nn.Sequential, *CEILINGS)
"""Modules whose result may lie where their input did."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Rectifier:
    """A ReLU and the quantizer that alone reads what it gives.

    Args:
        relu: of a type in ``CEILINGS``.
        quantizer: the stream's on the ReLU itself, or that of a layer's input.
        witnesses: for the latter, the modules that take or give the value on its way: their hooks would see it.
    """

    relu: nn.Module
    quantizer: LSQActivation
    witnesses: tuple[nn.Module, ...]

    def is_seen(self) -> bool:
        """Whether anybody else looks on now, or has changed what the two compute."""
        if not self.witnesses and first_reader(self.relu) is not self.quantizer:
            return True
        is_changed = any("forward" in vars(each) for each in (self.relu, self.quantizer))
        return is_changed or any(getattr(each, hooks) for each in (*self.witnesses, self.quantizer) for hooks in _HOOKS)


@contextmanager
def rectified_by_quantizers(rectifiers: Iterable[Rectifier]) -> Iterator[None]:
    """Within it the quantizers do what their ReLUs did; for a forward pass and its backward pass."""
    is_watched = bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
    found = [each for each in rectifiers if not is_watched and not each.is_seen()]
    for each in found:
        each.relu.forward = _pass_on
        each.quantizer.forward = partial(quantize_rectified, each.quantizer, each.relu)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for each in found:
            del each.relu.forward, each.quantizer.forward


def _pass_on(x: Tensor) -> Tensor:
    return x


def find(network: nn.Module) -> tuple[Rectifier, ...]:
    """The ReLUs of ``network`` that can be left to a quantizer; none where its forward pass cannot be traced."""
    tracer = _Tracer()
    try:
        tracer.trace(network)
    except Exception:  # whatever a stranger's forward raises when it meets a symbol; only time is lost
        return ()
    return tuple(filter(None, map(tracer.rectifier, dict.fromkeys(tracer.called.values()))))


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
        result = super().call_module(m, m.forward, args, kwargs)  # without hooks, which expect numbers
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, fx.Proxy):
                self.met.setdefault(value.node, []).append(m)
        if self.is_leaf_module(m, self.path_of_module(m)):
            self.called[result.node] = m
        return result

    def rectifier(self, relu: nn.Module) -> Rectifier | None:
        """The quantizer behind ``relu`` with it, if it may do its work."""
        nodes = [node for node, module in self.called.items() if module is relu]
        if type(relu) not in CEILINGS:
            return None
        if getattr(relu, "inplace", False) and not all(self._is_nobody_elses(node.args[0]) for node in nodes):
            return None
        stream = first_reader(relu)
        if stream is not None:
            return Rectifier(relu, stream, ()) if type(stream) is LSQActivation else None
        node, witnesses = nodes[0], self.met[nodes[0]]
        while len(node.users) == 1 and type(self.called.get(next(iter(node.users)))) is nn.Identity:
            (node,) = node.users
            witnesses = [*witnesses, *self.met[node]]
        layer = self.called.get(next(iter(node.users))) if len(node.users) == 1 else None
        if not isinstance(layer, QuantLayer) or type(layer.input_quantizer) is not LSQActivation:
            return None
        is_called_once = [*self.called.values()].count(layer) == 1 == len(nodes)
        return Rectifier(relu, layer.input_quantizer, tuple(witnesses)) if is_called_once else None

    def _is_nobody_elses(self, value: Any) -> bool:
        """Whether a ReLU that works in place changes nothing that somebody else reads, under whatever name."""
        while isinstance(value, fx.Node) and len(value.users) == 1:
            if value.target in _NEW_MEMORY or not isinstance(self.called.get(value, nn.Identity()), _OLD_MEMORY):
                return True
            value = value.args[0] if value.op in ("call_function", "call_module") and value.args else None
        return False
