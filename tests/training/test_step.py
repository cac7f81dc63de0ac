"""Clipping, each trained network by itself; and what a step keeps."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fewbits as fb
from fewbits.convert import quantize
from fewbits.distill import Losses, Objective
from fewbits.quantizers.again import QuantizingAgain, _active
from fewbits.recipes import RECIPES, Logits, Recipe
from fewbits.recipes.joint import Joint
from fewbits.training import Settings, setup
from fewbits.training.setup import make_accelerator
from fewbits.training.step import Stepper, backward, clip_gradients


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


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bf16", [False, True])
def test_quantizing_again_changes_no_bit_of_a_step(recipe: str, bf16: bool):
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    accelerator = make_accelerator(Settings(precision="bf16" if bf16 else "fp32", device="cpu"))
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        teacher = fb.models.build("resnet20", num_classes=10)
        made, needs = fb.recipes.make(recipe), fb.recipes.make(recipe).teacher.needs_teacher
        bits = 1 if recipe == "blockwise" else 4
        student = teacher if recipe == "float" else fb.quantize(teacher, bits, bits, residual=None if bits == 1 else 8)
        objective = made.objective(student, copy.deepcopy(teacher) if needs else None, batches=[images])
        losses = backward(accelerator, objective, (images, labels), 2, recompute=again)
        found.append([*losses.values(), *(p.grad for p in objective.parameters() if p.grad is not None)])
        objective.close()
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def kept_bytes(objective: Objective, images: Tensor, labels: Tensor, bf16: bool, again: bool) -> int:
    """What memory a forward pass leaves taken."""
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        QuantizingAgain() if again else nullcontext(),
    ):
        total = objective(images, labels).total
    total.backward()
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_low_bit_step_keeps_what_a_float_step_keeps(bf16: bool):
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    net = fb.models.build("resnet20", num_classes=10)
    students = {"float": net, "shortcuts": fb.quantize(net, 4, 4, residual=None), "streams": fb.quantize(net, 4, 4)}
    objectives = {
        name: fb.recipes.make("float" if name == "float" else "plain").objective(student, None, batches=[images])
        for name, student in students.items()
    }
    kept = {name: kept_bytes(made, images, labels, bf16, again=True) for name, made in objectives.items()}
    assert kept["shortcuts"] <= 1.01 * kept["float"]
    # What is added in a residual sum, for the gradient of its stream's step: one more of every four maps.
    assert kept["streams"] <= (1.35 if bf16 else 1.26) * kept["float"]
    assert kept_bytes(objectives["streams"], images, labels, bf16, again=False) > 1.6 * kept["streams"]


@pytest.mark.parametrize(("recompute", "compiled", "wanted"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_a_compiled_graph_is_left_alone(recompute: int, compiled: int, wanted: bool):
    """Found: under hooks on what it saves, nothing of it was free before its backward pass was over."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.randn(4, 3, 6, 6), torch.arange(4) % 3
    objective = fb.recipes.make("plain").objective(quantize(net, 4, 4), None, batches=[images])
    settings = Settings(recompute=bool(recompute), compile=bool(compiled), batch_size=4, device="cpu")
    stepper, seen = Stepper(objective, settings, make_accelerator(settings)), []

    class Looks(nn.Module):
        def forward(self, *batch: Any) -> Losses:
            seen.append(bool(_active.contexts))
            return objective(*batch)

    stepper._model = Looks()  # the compiled objective would trace past it
    stepper(images, labels, 1.0, "a test")
    assert seen == [wanted]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "is_promised"), [("plain", True), ("stochastic", False), ("two-stage", False)])
def test_what_compiled_graphs_may_rely_on(monkeypatch, recipe, is_promised):
    """Gates that a schedule closes, or somebody's hand, are read by the graph."""
    seen = []
    monkeypatch.setattr("fewbits.training.step.promised_open", lambda _, promise: nullcontext(seen.append(promise)))
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    student, images = quantize(teacher, 4, 4), torch.randn(4, 3, 6, 6)
    objective = RECIPES[recipe]().objective(student, teacher, batches=[images])
    settings = Settings(device="cpu", compile=True, batch_size=4)
    stepper = Stepper(objective, settings, make_accelerator(settings))
    objective.set_progress(0.1, 1)
    stepper(images, torch.tensor([0, 1, 2, 0]), 1.0, "step 0")
    assert seen == [is_promised]
    if is_promised:
        student[0].weight_quantizer.enabled.fill_(False)
        stepper(images, torch.tensor([0, 1, 2, 0]), 1.0, "step 1")
        assert seen == [True, False]
    torch._dynamo.reset()


@pytest.mark.parametrize(("device", "recompute", "wanted"), [("cpu", 1, 0), ("cuda", 1, 1), ("cuda", 0, 0)])
def test_only_a_gpu_casts_again(device: str, recompute: int, wanted: int, monkeypatch: pytest.MonkeyPatch):
    """On a processor it costs a step more time than its memory is worth."""
    asked = []
    monkeypatch.setattr(setup, "compiled", lambda objective, *, recompute: asked.append(recompute) or objective)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=1)
    settings = Settings(recompute=bool(recompute), compile=True, precision="bf16")
    setup.prepare(begun(Logits()), settings, accelerator, is_shared=False)
    assert asked == [bool(wanted)]
