"""Clipping: each trained network by itself."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from fewbits.convert import quantize
from fewbits.distill import Objective
from fewbits.recipes import Logits, Recipe
from fewbits.recipes.joint import Joint
from fewbits.training.step import clip_gradients


def begun(recipe: Recipe) -> Objective:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    student = quantize(teacher, 4, 4)
    made = recipe.objective(student, teacher, batches=[torch.randn(4, 3, 6, 6)])
    made(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])).total.backward()
    return made


def norm(module: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))


def test_each_network_by_itself():
    made = begun(Joint(feature="none"))
    networks = made.networks
    for parameter in networks.teacher.parameters():
        parameter.grad.mul_(1000.0)
    student, teacher = norm(networks.student), norm(networks.teacher)
    limit = 2 * student
    assert teacher > limit
    total = float(clip_gradients(Accelerator(cpu=True), made, limit))
    assert total == pytest.approx(math.hypot(student, teacher), rel=1e-4)
    assert norm(networks.student) == pytest.approx(student, rel=1e-4)
    assert norm(networks.teacher) == pytest.approx(limit, rel=1e-4)


def test_one_network():
    made = begun(Logits())
    whole = norm(made.networks.student)
    assert float(clip_gradients(Accelerator(cpu=True), made, None)) == pytest.approx(whole, rel=1e-5)
    assert norm(made.networks.student) == pytest.approx(whole, rel=1e-5)
    clip_gradients(Accelerator(cpu=True), made, whole / 4)
    assert norm(made.networks.student) == pytest.approx(whole / 4, rel=1e-3)
