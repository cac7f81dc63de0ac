"""Residual streams: what enters and leaves additions, concatenations and pooling, found by one symbolic trace.

A convolution whose output is added in float cannot run on integers in ONNX Runtime. ``residual=8`` therefore trains
8-bit quantizers on these values. They hang on modules as hooks, so that the model's own forward stays what it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .quantizers import Quantizer

OUTPUT_STREAM = "output_stream"
INPUT_STREAM = "input_stream"

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_CONCATENATIONS = {torch.cat, torch.concat}
_POOLINGS = {F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d, F.adaptive_max_pool2d, torch.mean}
# What hands a value on without leaving its grid: zero stays zero, levels stay levels.
_TRANSPARENT_FUNCTIONS = {operator.getitem, F.pad, F.relu, torch.relu, torch.flatten, F.max_pool2d, F.dropout}
_TRANSPARENT_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "relu", "relu_", "clone"}
_TRANSPARENT_MODULES = (nn.Identity, nn.ReLU, nn.MaxPool2d, nn.Dropout, nn.Flatten)
# Activations that follow an addition before its result is read.
_RECTIFIER_FUNCTIONS = {F.relu, torch.relu, F.relu6}
_RECTIFIER_MODULES = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)
_SIZES = {"size", "dim", "numel", "__len__"}


@dataclass(frozen=True)
class Place:
    """A value of the network that a hook can reach: a module's output, or its first input."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Trace:
    """What one symbolic trace saw.

    Args:
        order: quantizable layers in the order in which they run.
        places: where stream quantizers go.
        unreachable: additions with a value that no hook can reach, by the name of the module they stand in.
    """

    order: tuple[str, ...]
    places: tuple[Place, ...]
    unreachable: tuple[str, ...]


@dataclass
class _Seen:
    outputs: dict[str, list[fx.Node]] = field(default_factory=dict)
    inputs: dict[str, list[fx.Node]] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    """Records, beside the graph, which value each module took and gave."""

    def __init__(self, quantizable: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.quantizable = quantizable
        self.seen = _Seen()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.quantizable) or not any(isinstance(s, self.quantizable) for s in m.modules())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if args and isinstance(args[0], fx.Proxy):
            self.seen.inputs.setdefault(path, []).append(args[0].node)
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.seen.outputs.setdefault(path, []).append(result.node)
        return result


def trace(model: nn.Module, quantizable: tuple[type[nn.Module], ...]) -> Trace:
    """Follow ``model`` once with symbols instead of numbers.

    Args:
        model: the float network.
        quantizable: the layer types that are quantized.

    Raises:
        ValueError: the model's forward cannot be traced.
    """
    tracer = _Tracer(quantizable)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever a stranger's forward raises when it meets a symbol
        raise ValueError(
            f"residual needs to see the additions of {type(model).__name__}, and its forward cannot be traced "
            f"({type(error).__name__}: {error}); pass residual=None for float shortcuts"
        ) from error
    modules = dict(model.named_modules())
    order = [str(n.target) for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], quantizable)]
    finder = _Finder(modules, tracer.seen, quantizable)
    places: dict[Place, None] = {}
    unreachable = []
    for node in graph.nodes:
        for value in finder.streams(node):
            place = finder.place(value)
            if place is None:
                unreachable.append(finder.owner(node))
            else:
                places[place] = None
    return Trace(tuple(dict.fromkeys(order)), tuple(places), tuple(dict.fromkeys(unreachable)))


class _Finder:
    def __init__(self, modules: dict[str, nn.Module], seen: _Seen, quantizable: tuple[type[nn.Module], ...]) -> None:
        self.modules, self.seen, self.quantizable = modules, seen, quantizable
        self.placed: dict[fx.Node, Place | None] = {}

    def streams(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that need a quantizer because of ``node``."""
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
        stack = list(node.meta.get("nn_module_stack", {}))
        return stack[-1] if stack else "the model itself"

    def _find(self, value: fx.Node) -> Place | None:
        givers = [p for p, nodes in self.seen.outputs.items() if p and nodes == [value]]
        if givers:
            return Place(max(givers, key=lambda path: path.count(".")), "output")
        # A layer's own input has its own quantizer: only a block that takes the value serves.
        takers = [
            p
            for p, nodes in self.seen.inputs.items()
            if p and nodes == [value] and not isinstance(self.modules[p], self.quantizable)
        ]
        everyone = {p for p, nodes in self.seen.inputs.items() if value in nodes}
        outermost = [p for p in takers if all(q == p or q.startswith(p + ".") for q in everyone)]
        return Place(min(outermost, key=len), "input") if outermost else None

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if node.op == "call_function" and node.target in _ADDITIONS:
            return self._pair(node)
        if node.op == "call_method" and node.target in {"add", "add_"}:
            return self._pair(node)
        if node.op == "call_function" and node.target in _CONCATENATIONS and isinstance(node.args[0], list | tuple):
            return [v for v in node.args[0] if isinstance(v, fx.Node)]
        if self._is_pooling(node) and isinstance(node.args[0], fx.Node):
            return [node.args[0]]
        return []

    def _pair(self, node: fx.Node) -> list[fx.Node]:
        nodes = [v for v in node.args[:2] if isinstance(v, fx.Node)]
        return nodes if len(nodes) == 2 and all(self._is_activation(v) for v in nodes) else []

    def _is_pooling(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return "Pool" in type(self.modules[str(node.target)]).__name__
        return (node.op == "call_function" and node.target in _POOLINGS) or (
            node.op == "call_method" and node.target == "mean"
        )

    def _is_activation(self, node: fx.Node) -> bool:
        """Whether the value comes from the input: no parameter, no size."""
        if node.op == "get_attr" or (node.op == "call_method" and node.target in _SIZES):
            return False
        if node.op == "call_function" and node.target is getattr:
            return False
        if node.op in {"placeholder", "call_module"}:
            return True
        return any(self._is_activation(v) for v in node.all_input_nodes)

    def _source(self, node: fx.Node) -> fx.Node:
        """Walk back over what does not leave the grid."""
        while self._is_transparent(node) and node.all_input_nodes and self.place(node) is None:
            node = node.all_input_nodes[0]
        # A rectifier's own output is the better place, but a view of a value is quantized where the value is made.
        while self._is_transparent(node) and not self._is_rectifier(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def _is_transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return isinstance(module, _TRANSPARENT_MODULES)
        if node.op == "call_method":
            return node.target in _TRANSPARENT_METHODS
        return node.op == "call_function" and node.target in _TRANSPARENT_FUNCTIONS

    def _is_rectifier(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], _RECTIFIER_MODULES)
        if node.op == "call_method":
            return node.target in {"relu", "relu_"}
        return node.op == "call_function" and node.target in _RECTIFIER_FUNCTIONS

    def _result(self, node: fx.Node) -> fx.Node:
        """What leaves an addition: its value behind the rectifier, where that is all that reads it."""
        while len(node.users) == 1 and self._is_rectifier(next(iter(node.users))):
            node = next(iter(node.users))
        return node


def attach(module: nn.Module, side: Literal["input", "output"], quantizer: Quantizer) -> None:
    """Hang ``quantizer`` on what ``module`` takes or gives."""
    if side == "output":
        module.add_module(OUTPUT_STREAM, quantizer)
        module.register_forward_hook(_quantize_output)
    else:
        module.add_module(INPUT_STREAM, quantizer)
        module.register_forward_pre_hook(_quantize_input)


def _quantize_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    quantized: Tensor = module.get_submodule(OUTPUT_STREAM)(output)
    return quantized


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_submodule(INPUT_STREAM)(args[0]), *args[1:])
