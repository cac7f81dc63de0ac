"""Where stream quantizers go: which values of a traced network need one, and which hook reaches them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_CONCATENATIONS = {torch.cat, torch.concat}
_POOLINGS = {F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d, F.adaptive_max_pool2d, torch.mean}
# What hands a value on without leaving its grid: zero stays zero, levels stay levels.
_VIEW_FUNCTIONS = {operator.getitem, torch.flatten, torch.transpose, torch.permute}
_VIEW_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "clone"}
_SPLIT_FUNCTIONS = {torch.chunk, torch.split}
_SPLIT_METHODS = {"chunk", "split"}
_TRANSPARENT_FUNCTIONS = {*_SPLIT_FUNCTIONS, F.pad, F.relu, torch.relu, F.max_pool2d, F.dropout}
_TRANSPARENT_METHODS = {*_SPLIT_METHODS, "relu", "relu_"}
_TRANSPARENT_MODULES = (nn.Identity, nn.ReLU, nn.MaxPool2d, nn.Dropout, nn.Flatten)
# Activations that follow an addition before its result is read.
_RECTIFIER_FUNCTIONS = {F.relu, torch.relu, F.relu6, F.hardtanh}
_RECTIFIER_MODULES = (nn.ReLU, nn.Hardtanh, nn.Identity, nn.Dropout)
# Their forward runs whatever they hold, so that a quantizer among it would run as one more layer.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SIZES = {"size", "dim", "numel", "__len__"}


@dataclass(frozen=True)
class Place:
    """A value of the network that a hook can reach: a module's output, or its first input."""

    module: str
    side: Literal["input", "output"]


@dataclass
class Seen:
    """Of each module, by name: the values that it gave and took, call by call."""

    outputs: dict[str, list[fx.Node]] = field(default_factory=dict)
    inputs: dict[str, list[fx.Node]] = field(default_factory=dict)


class Finder:
    """Which values of a traced network need a quantizer, and which hook reaches each.

    Args:
        modules: of the network, by name.
        seen: what the trace recorded of each module.
        quantizable: the layer types that are quantized.
    """

    def __init__(self, modules: dict[str, nn.Module], seen: Seen, quantizable: tuple[type[nn.Module], ...]) -> None:
        self.modules, self.seen, self.quantizable = modules, seen, quantizable
        self.placed: dict[fx.Node, Place | None] = {}

    def streams(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that need a quantizer because of ``node``."""
        if self._is_convolution(node):
            chain = self._normed(node)
            readers = self._behind(chain[-1])
            if any(not self._is_quantized(reader) for reader in readers) or len(readers) > 1:
                yield self._reachable(chain)
            return
        operands = [v for v in self._operands(node) if self._is_activation(v)]
        if not operands:
            return
        yield from (self._source(v) for v in operands)
        if not self._is_pooling(node):
            yield self._result(node)

    def place(self, value: fx.Node) -> Place | None:
        """The hook that reaches ``value``: the innermost module, called once, that gives it or takes it."""
        if value not in self.placed:
            self.placed[value] = self._find(value)
        return self.placed[value]

    def owner(self, node: fx.Node) -> str:
        """The qualified name of the module whose forward makes ``node``."""
        return _callers(node)[-1] or "the model itself"

    def is_read_quantized(self, value: fx.Node) -> bool:
        """Whether quantized layers alone read ``value``: their own quantizers put it on a grid."""
        return all(
            (user.op == "call_module" and type(self.modules[str(user.target)]) in self.quantizable)
            or (self._is_view(user) and self.is_read_quantized(user))
            for user in _readers(value)
        )

    def _find(self, value: fx.Node) -> Place | None:
        place = self._hook(value)
        # A value that is only read in another shape may be quantized in that shape.
        while place is None and len(_readers(value)) == 1 and self._is_view(_readers(value)[0]):
            value = _readers(value)[0]
            place = self._hook(value)
        return place

    def _hook(self, value: fx.Node) -> Place | None:
        givers = [p for p, nodes in self.seen.outputs.items() if nodes == [value] and self._can_hold(p)]
        if givers:
            return Place(max(givers, key=lambda path: path.count(".")), "output")
        takers = [
            p
            for p, nodes in self.seen.inputs.items()
            # A layer's own input has its own quantizer: only a block that takes the value serves.
            if nodes == [value] and self._can_hold(p) and not isinstance(self.modules[p], self.quantizable)
        ]
        # What a module takes is quantized for that module alone: nobody outside may read the value.
        sole = [p for p in takers if all(_is_inside(user, p) for user in _readers(value))]
        return Place(min(sole, key=len), "input") if sole else None

    def _can_hold(self, path: str) -> bool:
        return path != "" and not isinstance(self.modules[path], _CONTAINERS)

    def _is_convolution(self, node: fx.Node) -> bool:
        return self._is_quantized(node) and isinstance(self.modules[str(node.target)], nn.Conv2d)

    def _normed(self, node: fx.Node) -> list[fx.Node]:
        """A convolution's result, and what its batch norm and rectifiers make of it: an engine folds them into it."""
        chain, readers = [node], _readers(node)
        if len(readers) == 1 and self._is_norm(readers[0]):
            chain.append(readers[0])
        return self._rectified(chain)

    def _rectified(self, chain: list[fx.Node]) -> list[fx.Node]:
        """``chain`` and the rectifiers behind it, as long as nobody else reads what is between."""
        while len(_readers(chain[-1])) == 1 and self._is_rectifier(_readers(chain[-1])[0]):
            chain.append(_readers(chain[-1])[0])
        return chain

    def _reachable(self, chain: list[fx.Node]) -> fx.Node:
        """The last value that a hook reaches, or else the last one."""
        return next((value for value in reversed(chain) if self.place(value)), chain[-1])

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], nn.BatchNorm2d)
        return _calls(node, {F.batch_norm}, set())

    def _behind(self, value: fx.Node) -> list[fx.Node]:
        """What reads ``value``, behind what only hands it on, but for operators whose operands are streams anyway."""
        found: list[fx.Node] = []
        for user in _readers(value):
            if self._is_transparent(user) or self._is_rectifier(user):
                found += self._behind(user)
            elif user.op != "output" and not self._operands(user):
                found.append(user)
        return found

    def _is_quantized(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], self.quantizable)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if _calls(node, _ADDITIONS, {"add", "add_"}):
            return self._pair(node)
        if _calls(node, _CONCATENATIONS, set()) or self._is_pooling(node):
            return node.all_input_nodes
        return []

    def _pair(self, node: fx.Node) -> list[fx.Node]:
        nodes = [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, fx.Node)]
        return nodes if len(nodes) == 2 and all(self._is_activation(v) for v in nodes) else []

    def _is_pooling(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return "Pool" in type(self.modules[str(node.target)]).__name__
        return _calls(node, _POOLINGS, {"mean"})

    def _is_activation(self, node: fx.Node) -> bool:
        """Whether the value comes from the input: no parameter, no size."""
        if node.op == "get_attr" or _is_size(node):
            return False
        if node.op in {"placeholder", "call_module"}:
            return True
        return any(self._is_activation(v) for v in node.all_input_nodes)

    def _source(self, node: fx.Node) -> fx.Node:
        """Walk back over what does not leave the grid."""
        # A view of a value is quantized where the value is made; a rectifier makes one, unless nothing reaches it.
        while (self._is_transparent(node) or self._is_rectifier(node)) and node.all_input_nodes:
            if self._is_rectifier(node) and not self._only_hands_on(node) and self.place(node) is not None:
                break
            node = node.all_input_nodes[0]
        return node

    def _only_hands_on(self, node: fx.Node) -> bool:
        """Identity and dropout: they follow additions like rectifiers, but make no value of their own."""
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.Identity | nn.Dropout)

    def _is_transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            is_empty = isinstance(module, nn.Sequential) and len(module) == 0  # a shortcut in many a ResNet
            return is_empty or isinstance(module, _TRANSPARENT_MODULES)
        return self._is_view(node) or _calls(node, _TRANSPARENT_FUNCTIONS, _TRANSPARENT_METHODS)

    def _is_view(self, node: fx.Node) -> bool:
        if node.target is operator.getitem and isinstance(node.args[1], int):
            # Unpacking what a module returned as a tuple: a hook meets the tuple, not the tensor.
            made_by = node.args[0]
            return isinstance(made_by, fx.Node) and _calls(made_by, _SPLIT_FUNCTIONS, _SPLIT_METHODS)
        return _calls(node, _VIEW_FUNCTIONS, _VIEW_METHODS)

    def _is_rectifier(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], _RECTIFIER_MODULES)
        return _calls(node, _RECTIFIER_FUNCTIONS, {"relu", "relu_"})

    def _result(self, node: fx.Node) -> fx.Node:
        """What leaves an addition: its value behind the rectifier, where that is all that reads it."""
        return self._reachable(self._rectified([node]))


def _calls(node: fx.Node, functions: Collection[Any], methods: Collection[str]) -> bool:
    """Whether ``node`` calls one of these functions or, by name, one of these methods of a tensor."""
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _is_size(node: fx.Node) -> bool:
    return _calls(node, {getattr}, _SIZES)


def _readers(value: fx.Node) -> list[fx.Node]:
    """The nodes that read the numbers of ``value``, not only its shape."""
    return [user for user in value.users if not _is_size(user)]


def _callers(node: fx.Node) -> list[str]:
    """Qualified names of the modules in whose forward ``node`` is made, from the model itself inwards."""
    return ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]


def _is_inside(node: fx.Node, path: str) -> bool:
    return path in _callers(node) or (node.op == "call_module" and node.target == path)
