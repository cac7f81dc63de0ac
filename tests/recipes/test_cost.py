"""What a recipe says it costs, against what its objectives run."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.convert import quantize
from fewbits.distill import Objective
from fewbits.models import build
from fewbits.recipes import RECIPES, make
from fewbits.recipes.cost import cost_of


def passes(made: Objective, images: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Networks that learn in a step, and those that only run: counted with hooks, and by who got a gradient."""
    there = [n for n in (made.networks.student, made.networks.teacher) if n is not None]
    runs: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any, output: Any) -> None:
        runs[module] += 1

    handles = [network.register_forward_hook(count) for network in there]
    made(images, labels).total.backward()
    for handle in handles:
        handle.remove()
    assert set(runs.values()) == {1}
    learn = [network for network in runs if any(p.grad is not None for p in network.parameters())]
    made.networks.zero_grad()
    return len(learn), len(runs) - len(learn)


@pytest.mark.parametrize("name", [*RECIPES, "ftl+stochastic+joint"])
def test_the_cost_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)
    recipe, images, labels = make(name), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])
    teacher = build("resnet20", num_classes=3, channels=1)
    bits = 1 if name == "blockwise" else 4
    student = quantize(teacher, bits, bits) if recipe.quantized else build("resnet20", num_classes=3, channels=1)
    trained = frozen = 0.0
    networks = None
    for index, phase in enumerate(recipe.phases()):
        made = recipe.objective(student, teacher, batches=[images], phase=index, networks=networks)
        networks = made.networks
        learning, reading = passes(made, images, labels)
        trained += phase.share * learning
        frozen += phase.share * reading
    assert (cost_of(recipe).trained, cost_of(recipe).frozen) == pytest.approx((trained, frozen))
