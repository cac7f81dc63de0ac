"""Micro-batches of a step share quantized weights: the same gradients, one pass of each weight's quantizer."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewbits.convert import quantize
from fewbits.distill import Objective
from fewbits.layers import QuantLayer
from fewbits.quantizers import Quantizer
from fewbits.recipes import make
from fewbits.recipes.joint import Joint
from fewbits.training.compiling import compiled
from fewbits.training.step import backward
from fewbits.training.weights import SharedWeights


def net() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 3))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 6, 6), torch.randint(3, (8,))


def begun(recipe: str, method: str = "lsq") -> Objective:
    torch.manual_seed(0)
    teacher = net()
    student = quantize(teacher, 4, 4, quantizer=method)
    made = Joint(feature="none") if recipe == "joint" else make(recipe)
    return made.objective(student, teacher if made.teacher.needs_teacher else None, batches=[batch()[0]])


def gradients(objective: Objective, num_parts: int, shared: bool, run: nn.Module | None = None) -> dict[str, Tensor]:
    objective.zero_grad()
    backward(Accelerator(cpu=True), objective if run is None else run, batch(), num_parts if shared else 1)
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def plainly(objective: Objective, num_parts: int) -> dict[str, Tensor]:
    """Each micro-batch quantizes for itself."""
    objective.zero_grad()
    for images, labels in zip(*(whole.chunk(num_parts) for whole in batch()), strict=True):
        (objective(images, labels).total / num_parts).backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["plain", "logits", "joint", "stochastic"])
@pytest.mark.parametrize("method", ["lsq", "ewgs", "dorefa", "minmax"])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_the_same_gradients(recipe: str, method: str, num_parts: int):
    objective = begun(recipe, method)
    objective.set_progress(0.5, 7)
    # As the whole batch has it, EWGS's look at the sign of a weight's gradient included; ranges of min-max are a
    # micro-batch's own.
    wanted = plainly(objective, num_parts if method == "minmax" else 1)
    given = gradients(objective, num_parts, shared=True)
    assert given.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(given[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_each_weight_is_quantized_once(num_parts: int):
    objective = begun("plain")
    calls: Counter[str] = Counter()
    for module in objective.modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(lambda *_, role=module.spec.role: calls.update([role]))
    gradients(objective, num_parts, shared=True)
    layers = [module for module in objective.modules() if isinstance(module, QuantLayer)]
    assert calls["weight"] == len(layers) == 3
    assert calls["activation"] >= num_parts * len(layers)
    assert all(layer.quantized_weight is None for layer in layers)


def test_a_layer_that_the_last_micro_batch_does_not_use_has_its_gradient():
    layer = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), 4, 32)[0]
    x = torch.randn(2, 3, 5, 5)
    layer.calibrate_weight()
    layer(x).square().sum().backward()
    wanted = layer.weight.grad.clone()
    layer.zero_grad()
    with SharedWeights(layer, 2) as weights:
        layer(x).square().sum().backward()
        weights.last()
        weights.finish()
    assert torch.equal(layer.weight.grad, wanted)


def test_an_error_on_the_way_leaves_nothing_behind():
    objective = begun("plain")
    images, labels = batch()
    with pytest.raises(ValueError, match="labels must lie"):
        backward(Accelerator(cpu=True), objective, (images, labels + 100), 2)
    assert all(m.quantized_weight is None for m in objective.modules() if isinstance(m, QuantLayer))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_compiled_once_for_all_micro_batches():
    torch._dynamo.reset()
    objective = begun("plain")
    run = compiled(objective)
    wanted = plainly(objective, 4)
    for _ in range(2):
        given = gradients(objective, 4, shared=True, run=run)
        for name, grad in wanted.items():
            torch.testing.assert_close(given[name], grad, rtol=1e-3, atol=1e-5, msg=name)
    torch._dynamo.reset()
