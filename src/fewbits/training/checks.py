"""What ``fit`` refuses before anything is read or written: arguments that cannot fit together."""

from __future__ import annotations

import torch
from torch import nn

from ..data import Dataset
from ..recipes import RECIPES, Recipe


def check_recipe(recipe: object) -> Recipe:
    """The recipe, if it is one.

    Raises:
        TypeError: it is a name, or the function that makes it; the message says what to write instead.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        hint = f"pass recipe=fewbits.recipes.make({recipe!r})"
    elif callable(recipe):
        hint = f"call it: recipe={getattr(recipe, '__name__', 'NAME')}()"
    else:
        hint = f"make one with fewbits.recipes.make(NAME), NAME one of {', '.join(RECIPES)}"
    raise TypeError(f"recipe must be a fewbits.Recipe, got {recipe!r}; {hint}")


def check_data(data: object) -> Dataset:
    """The data set, if it is one.

    Raises:
        TypeError: it is something else, a loader say.
    """
    if isinstance(data, Dataset):
        return data
    raise TypeError(
        f"data must be a fewbits.data.Dataset, got {type(data).__name__}; use fewbits.data.load(NAME) or "
        "Dataset.from_tensors, or write your own loop around recipe.objective(...)"
    )


def check_outputs(student: nn.Module, data: Dataset) -> None:
    """A classifier with fewer outputs than classes is an error now, and not in the first loss."""
    layers = [m for m in student.modules() if isinstance(m, nn.Linear)]
    if layers and layers[-1].out_features < data.num_classes:
        raise ValueError(
            f"the student's last linear layer has {layers[-1].out_features} outputs, but {data.name} has "
            f"{data.num_classes} classes; build it with num_classes={data.num_classes}"
        )


@torch.no_grad()
def check_channels(network: nn.Module, name: str, data: Dataset) -> None:
    """A network for colour does not take grey images, nor the other way round; torch says so in numbers only.

    Raises:
        ValueError: it does not run on the data's images; the message names both numbers of channels.
    """
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels == data.channels:
        return
    # A network may turn grey into colour by itself: what counts is whether it runs.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        network(data.pixels(1).to(first.weight.device))
    except RuntimeError as error:
        raise ValueError(
            f"the {name}'s first convolution takes {first.in_channels} channels, but the images of {data.name} have "
            f"{data.channels}; build it for them, fewbits.models.build(NAME, channels={data.channels}, ...), or give "
            f"images of {first.in_channels} ({error})"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
