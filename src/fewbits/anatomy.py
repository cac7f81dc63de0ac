"""Where a network's stages, blocks and head are, so that a recipe finds its taps in any network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from .layers import QuantLayer
from .quantizers import Quantizer

_STAGE = re.compile(r"^(layer\d+|stage\d+|stages[._]\d+|layers[._]\d+|features|blocks)$")
_BLOCK = re.compile(
    r"^(layer\d+\.\d+|stages[._]\d+\.blocks[._]\d+|layers[._]\d+\.blocks[._]\d+|s\d+\.b\d+|blocks[._]\d+\.\d+)$"
)
_FLAT_BLOCK = re.compile(r"^(blocks[._]\d+|features\.\d+)$")
# timm counts the stem as a stage; a stage that a loss compares ends a resolution behind blocks.
_STEMS = {"act1", "bn1", "conv_stem", "stem", "features.norm0"}


@dataclass(frozen=True)
class Anatomy:
    """Qualified names of a network's parts.

    The feature of the network is what enters its head: the vector behind the pooling.

    Args:
        stages: modules whose outputs end a resolution, from the input on.
        blocks: residual blocks, or whatever repeats, in order.
        head: the classifier, a linear layer or a convolution.
    """

    stages: tuple[str, ...]
    blocks: tuple[str, ...]
    head: str

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Read off ``model``: what timm says of itself, else by the names that common families use.

        Raises:
            ValueError: there is no linear or convolutional layer that could be a head.
        """
        names = [name for name, module in model.named_modules() if name and _holds_layers(module)]
        head = _stated_head(model) or _last_layer(model)
        # MobileNets hold stages of blocks in "blocks", transformers the blocks themselves.
        blocks = tuple(name for name in names if _BLOCK.match(name)) or tuple(
            name for name in names if _FLAT_BLOCK.match(name)
        )
        stages = _stated_stages(model) or tuple(name for name in names if _STAGE.match(name))
        return cls(stages=stages, blocks=blocks, head=head)


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear | nn.Conv2d) for inner in module.modules() if inner is not module)


def _last_layer(model: nn.Module) -> str:
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = layers or [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no nn.Linear and no nn.Conv2d that could be its head")
    return layers[-1]


def _stated_head(model: nn.Module) -> str | None:
    config: Any = getattr(model, "default_cfg", None) or {}
    stated = config.get("classifier") if hasattr(config, "get") else None
    if isinstance(stated, list | tuple) and stated:
        stated = stated[0]  # a distilled transformer has a second head, for its teacher's labels
    if not isinstance(stated, str):
        return None
    modules = dict(model.named_modules())
    return stated if isinstance(modules.get(stated), nn.Linear | nn.Conv2d) else None


def _stated_stages(model: nn.Module) -> tuple[str, ...]:
    information: Any = getattr(model, "feature_info", None)
    if not isinstance(information, list):
        return ()
    modules = dict(model.named_modules())
    stated = [entry.get("module", "") for entry in information if isinstance(entry, dict)]
    return tuple(name for name in stated if name in modules and name not in _STEMS)


def readers(model: nn.Module, example: Tensor, modules: Iterable[str]) -> dict[str, str | None]:
    """The first quantized layer that reads the output of each of ``modules``; None where no such layer does.

    Found by running ``model`` once and comparing tensors by identity, so that views, containers and stream quantizers
    in between make no difference as long as they hand the same tensor on. None means that something else reads it
    first (pooling, a norm, a function) or that the layer behind has a float input.

    Args:
        model: a quantized network.
        example: a few images, N x C x H x W, on the model's device.
        modules: qualified names.
    """
    outputs: dict[str, tuple[Tensor, int]] = {}
    found: dict[str, str | None] = dict.fromkeys(modules)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, (output, output._version))

        return hook

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for giver, (output, version) in outputs.items():
                # What was written to in between, by an in-place ReLU say, is another value.
                if args[0] is output and output._version == version and found[giver] is None:
                    found[giver] = name

        return hook

    parts = dict(model.named_modules())
    handles = [parts[name].register_forward_hook(keep(name)) for name in found if name in parts]
    for name, module in parts.items():
        if isinstance(module, QuantLayer) and module.input_quantizer is not None:
            handles.append(module.register_forward_pre_hook(compare(name)))
    with _one_pass(model, handles):
        model(example)
    return found


def before_pooling(model: nn.Module, head: str, example: Tensor) -> str:
    """The module that gives what is pooled into the head's feature: a map, or all tokens.

    Found by running ``model`` once: of the tensors that modules gave before the head ran, the last one that has
    positions beside the feature's dimensions. Of the modules that gave this tensor, the innermost one that runs once
    and is no container.

    Args:
        model: float or quantized.
        head: its classifier, which takes N x D.
        example: a few images, N x C x H x W, on the model's device.

    Raises:
        ValueError: no module gives such a tensor.
    """
    given: list[tuple[str, Tensor, int]] = []
    feature: list[Tensor] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not feature and isinstance(output, Tensor):
                given.append((name, output, output._version))

        return hook

    parts = dict(model.named_modules())
    # A stream quantizer hangs on a module whose output is its own; nothing is called by its name.
    handles = [m.register_forward_hook(keep(name)) for name, m in parts.items() if not isinstance(m, Quantizer)]
    handles.append(parts[head].register_forward_pre_hook(lambda module, args: feature.append(args[0])))
    with _one_pass(model, handles):
        model(example)
    width = feature[0].shape[1]
    maps = [entry for entry in given if entry[1].ndim > 2 and entry[1].numel() > entry[1].shape[0] * width]
    names = [name for name, _, _ in given]
    if maps and width in (maps[-1][1].shape[1], maps[-1][1].shape[-1]):
        _, last, last_version = maps[-1]
        for name, output, version in maps:
            # A module that was written over in place afterwards (y += x, ReLU) gave another value.
            is_it = output is last and version == last_version
            if is_it and names.count(name) == 1 and not isinstance(parts[name], nn.Sequential):
                return name
    raise ValueError(
        f"no module of {type(model).__name__} gives a map with the {width} channels that its head reads, so there is "
        "nothing before the pooling to compare; take the feature behind it (pooled=True)"
    )


@contextmanager
def _one_pass(model: nn.Module, handles: list[Any]) -> Iterator[None]:
    """Eval mode without gradients; hooks and mode are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
