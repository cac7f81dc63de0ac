"""Where a network's stages, blocks and head are, so that a recipe finds its taps in any network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

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
