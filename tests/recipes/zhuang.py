"""A small network with two stages, and a run of all phases of a recipe: shared by the tests of Zhuang et al."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.convert import quantize
from fewbits.distill import Objective
from fewbits.recipes import Recipe

CLASSES = 3


def network(width: int = 6) -> nn.Module:
    """Stem, two stages of two blocks each, head; names as in the common families."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())

    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 3, padding=1),
            relu=nn.ReLU(),
            layer1=nn.Sequential(block(), block()),
            layer2=nn.Sequential(block(), block()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(width, CLASSES),
        )
    )


def batch(num: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, 6, 6), torch.arange(num) % CLASSES


def phases(recipe: Recipe, bits: tuple[int, int] = (2, 2), steps: int = 2, **options: Any) -> Iterator[Objective]:
    """The objective of each phase, trained for some steps after it was looked at."""
    teacher = network()
    student = quantize(teacher, *bits, **options)
    held = None
    for index in range(len(recipe.phases())):
        made = recipe.objective(student, teacher, batches=[batch()], phase=index, networks=held)
        made.set_progress(0.0, 0)
        yield made
        optimizer = torch.optim.SGD(made.param_groups(0.01), momentum=0.9)
        for step in range(steps):
            made.set_progress(step / steps, step)
            made(*batch()).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        held = made.networks
