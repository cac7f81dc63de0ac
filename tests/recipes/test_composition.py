"""Any schedule with any teacher, any terms and any quantizer: trained, stopped, resumed and exported."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits.data import Dataset
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.precision import is_fully_quantized
from fewbits.recipes import QFD, BlockWise, Frozen, Joint, JointTeacher, QuantizedFeature, Recipe, TeacherPolicy, make
from fewbits.training import loop, read_metrics

from .zhuang import network

TEACHING = ("plain", "logits", "features", "ftl", "qfd", "joint", "dtq", "l2-sp", "delta", "blockwise")
TEACHERS: dict[str, TeacherPolicy] = {"frozen": Frozen(), "joint": JointTeacher(), "quantized": QuantizedFeature()}
SCHEDULES = ("", "two-stage", "progressive", "stochastic")
QUANTIZERS = ("lsq", "dorefa", "pact", "ewgs", "minmax", "bireal")
FACTORS = (TEACHING, tuple(TEACHERS), SCHEDULES, QUANTIZERS)


def allowed(case: tuple[str, ...]) -> bool:
    """What makes sense: the rest is refused, which other tests see to."""
    teaching, teacher, schedule, quantizer = case
    if teaching in ("dtq", "delta") and teacher != "frozen":
        return False  # they compare with what the source network computes
    if teaching == "blockwise" and quantizer != "bireal":
        return False  # its blocks are binary
    return (schedule, quantizer) != ("progressive", "bireal")  # one bit has no 8 bits to fall from


def recipe_of(teaching: str, teacher: str, schedule: str) -> Recipe:
    """The terms and edits of one, the teacher of another, the schedule of a third."""
    own = {
        "qfd": QFD(retrain=teacher == "quantized"),  # else it rounds the feature of whatever teacher there is
        "joint": Joint(train_teacher=False),
        "blockwise": BlockWise(stages="one"),
    }
    recipe = (own.get(teaching) or make(teaching)).with_options(teacher=TEACHERS[teacher])
    return recipe + make(schedule) if schedule else recipe


def covering() -> Iterator[tuple[str, ...]]:
    """Few combinations in which each two choices meet at least once: greedily, the case with most new pairs first."""

    def pairs(case: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    cases = [case for case in itertools.product(*FACTORS) if allowed(case)]
    missing = set().union(*map(pairs, cases))
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield best


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 8)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return fb.data.load("digits").per_class(4, seed=0)


def grey(residual: bool, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    if residual:
        return CifarResNet((1, 1), (4, 8), projection=False, num_classes=classes, channels=1, architecture="tiny")
    model = network(8)
    model.conv = nn.Conv2d(1, 8, 3, padding=1)
    model.head = nn.Linear(8, classes)
    return model


class Stopped(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("case", tuple(covering()), ids=lambda case: "-".join(part or "fixed" for part in case))
def test_combination(case: tuple[str, ...], data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teaching, policy, schedule, quantizer = case
    recipe = recipe_of(teaching, policy, schedule)
    bits = 1 if quantizer == "bireal" else 2
    teacher = grey(residual=teaching == "blockwise")
    options: dict[str, Any] = {
        "recipe": recipe,
        "data": data,
        "epochs": 2 * len(recipe.phases()),
        "batch_size": 20,
        "lr": 0.01,
        "progress": False,
        "tensorboard": False,
        "checkpoint_seconds": 0.0,
        "bn_batches": 0,
    }

    def student() -> nn.Module:
        return fb.quantize(teacher, bits, bits, quantizer=quantizer)

    whole = fb.fit(student(), teacher, output=tmp_path / "whole", **options)
    after_step, stop_at = loop.Loop._after_step, whole_steps(tmp_path / "whole") * 2 // 3

    def stop(self: Any, *args: Any) -> None:
        after_step(self, *args)
        if self.position.total_step == stop_at:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_after_step", stop)
        with pytest.raises(Stopped):
            fb.fit(student(), teacher, output=tmp_path / "parts", **options)
    fb.fit(student(), teacher, output=tmp_path / "parts", resume=True, **options)
    first, second = (tmp_path / name / "student.safetensors" for name in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()
    assert is_fully_quantized(whole.student)
    exported = fb.export(whole.student, tmp_path / "student.onnx", example=data.pixels(40))
    assert exported.path.exists()


def whole_steps(folder: Path) -> int:
    """Optimizer steps of a finished run."""
    return int(read_metrics(folder)[-1]["step"])
