"""One symbolic trace of a network: its layers in order, and the places of its streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .finder import Finder, Place, Seen


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


class _Tracer(fx.Tracer):
    """Records, beside the graph, which value each module took and gave."""

    def __init__(self, quantizable: tuple[type[nn.Module], ...], deep: bool) -> None:
        super().__init__()
        self.quantizable = quantizable
        self.deep = deep
        self.seen = Seen()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m).forward is nn.Sequential.forward and len(list(m.children())) > 0:
            return False  # it cannot hold a quantizer, but the modules in it can
        if self.deep and not isinstance(m, self.quantizable):
            return super().is_leaf_module(m, module_qualified_name)
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
    # A stranger's parameter-free module, an option-A shortcut say, is looked into where that works: what it only
    # pads or slices stays on the grid that it came with. Where its code cannot be followed it counts as one step.
    tracer = _Tracer(quantizable, deep=True)
    try:
        try:
            graph = tracer.trace(model)
        except Exception:
            tracer = _Tracer(quantizable, deep=False)
            graph = tracer.trace(model)
    except Exception as error:  # whatever a stranger's forward raises when it meets a symbol
        raise ValueError(
            f"residual needs to see the additions of {type(model).__name__}, and its forward cannot be traced "
            f"({type(error).__name__}: {error}); pass residual=None for float shortcuts"
        ) from error
    modules = dict(model.named_modules())
    order = [str(n.target) for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], quantizable)]
    finder = Finder(modules, tracer.seen, quantizable)
    places: dict[Place, None] = {}
    unreachable = []
    for node in graph.nodes:
        for value in finder.streams(node):
            place = finder.place(value)
            if place is not None:
                places[place] = None
            elif not finder.is_read_quantized(value):
                unreachable.append(finder.owner(node))
    return Trace(tuple(dict.fromkeys(order)), tuple(places), tuple(dict.fromkeys(unreachable)))
