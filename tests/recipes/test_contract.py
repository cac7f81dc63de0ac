"""What every listed recipe promises."""

import copy
import dataclasses
import json
import math
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.anatomy import Anatomy
from fewbits.convert import quantize
from fewbits.distill import CrossEntropy, Group, Objective, Phase
from fewbits.models.resnet_cifar import BasicBlock
from fewbits.recipes import (
    FTL,
    QFD,
    RECIPES,
    Features,
    Float,
    Joint,
    JointTeacher,
    Logits,
    NoTeacher,
    Plain,
    Recipe,
    make,
)
from fewbits.training.folder import as_data


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)


every_recipe = pytest.mark.parametrize("name", RECIPES)


def network(classes: int = 3) -> nn.Module:
    """Two stages and a head, named as the common families name them."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 6, 3, padding=1),
            bn=nn.BatchNorm2d(6),
            relu=nn.ReLU(),
            layer1=nn.Sequential(BasicBlock(6, 6, 1, nn.Identity())),
            layer2=nn.Sequential(BasicBlock(6, 6, 1, nn.Identity())),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(6, classes),
        )
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])


def student_for(recipe: Recipe, teacher: nn.Module) -> nn.Module:
    if not recipe.quantized:
        return network()
    return quantize(teacher, 1, 1) if recipe.name == "blockwise" else quantize(teacher, 4, 4)


def train(made: Objective, num_steps: int = 2, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(made.param_groups(lr), momentum=0.9)
    for step in range(num_steps):
        made.set_progress(step / num_steps, step)
        losses = made(*batch())
        assert bool(torch.isfinite(losses.total))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@every_recipe
def test_every_phase_trains_whom_it_says_and_no_one_else(name: str):
    recipe, teacher = make(name), network()
    student = student_for(recipe, teacher)
    untouched, held = copy.deepcopy(teacher.state_dict()), None
    for index, phase in enumerate(recipe.phases()):
        made = recipe.objective(student, teacher, batches=[batch()], phase=index, networks=held)
        held = made.networks
        assert held.student is student
        assert (held.teacher is None) == (not recipe.teacher.needs_teacher)
        before = {n: copy.deepcopy(held.network(n).state_dict()) for n in ("student", "teacher") if getattr(held, n)}
        train(made)
        trained = {group.network for group in phase.trains}
        for network_name, state in before.items():
            assert same(held.network(network_name).state_dict(), state) == (network_name not in trained)
    assert same(teacher.state_dict(), untouched)  # the caller's object, whatever the recipe does to its copy
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules()) or held.teacher is teacher
    made.close()
    assert all(p.requires_grad for p in teacher.parameters())


@every_recipe
def test_shares_are_the_whole_budget(name: str):
    phases = make(name).phases()
    assert sum(phase.share for phase in phases) == pytest.approx(1.0)
    assert all(phase.share > 0 for phase in phases)
    assert phases[-1].trains[0] == Group("student")
    assert len({phase.name for phase in phases}) == len(phases)


@every_recipe
def test_recipes_are_frozen_values(name: str):
    recipe = make(name)
    assert recipe == make(name)
    assert hash(recipe) == hash(make(name))
    assert recipe != recipe.with_options(name="another")
    assert recipe.phases() == make(name).phases()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "another"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.terms[0].weight = 2.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.phases()[0].share = 0.0  # type: ignore[misc]


@every_recipe
def test_recipes_are_saved_as_json(name: str):
    recipe = make(name)
    saved = json.loads(json.dumps(as_data(recipe)))
    assert saved["name"] == recipe.name
    assert [term["is"] for term in saved["terms"]] == [type(term).__name__ for term in recipe.terms]
    assert saved == json.loads(json.dumps(as_data(copy.deepcopy(recipe))))
    json.dumps(as_data(recipe.phases()))


def test_different_options_are_different_data():
    for one, two in (
        (QFD(), QFD(bits=2)),
        (QFD(), QFD(0.1)),
        (Logits(), Logits(temperature=2.0)),
        (Plain(), Plain(0.1)),
    ):
        assert one != two
        assert as_data(one) != as_data(two)


@every_recipe
def test_the_same_run_twice(name: str):
    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        recipe, teacher = make(name), network()
        student, held = student_for(recipe, teacher), None
        for index in range(len(recipe.phases())):
            made = recipe.objective(student, teacher, batches=[batch()], phase=index, networks=held)
            train(made)
            held = made.networks
        return student.state_dict()

    assert same(run(), run())


# Bad input


@every_recipe
def test_phases_in_another_order(name: str):
    recipe, teacher = make(name), network()
    student, last = student_for(recipe, teacher), len(recipe.phases()) - 1
    for phase in (-1, last + 1):
        with pytest.raises(ValueError, match=rf"phase must be 0\.\.{last} for recipe '{recipe.name}', got {phase}"):
            recipe.objective(student, teacher, batches=[batch()], phase=phase)
    made = recipe.objective(student, teacher, batches=[batch()])
    with pytest.raises(ValueError, match=r"phase 0 .* 1 phases have run"):
        recipe.objective(student, teacher, batches=[batch()], phase=0, networks=made.networks)


def test_a_later_phase_without_its_earlier_ones():
    teacher = network()
    with pytest.raises(ValueError, match=r"phase 1 of recipe 'qfd' needs the networks of phase 0.*pass networks="):
        QFD().objective(quantize(teacher), teacher, batches=[batch()], phase=1)


def test_a_later_phase_with_another_student():
    """Found: the student that was passed was not the one that was trained, in silence."""
    teacher, recipe = network(), QFD()
    made = recipe.objective(quantize(teacher), teacher, batches=[batch()])
    with pytest.raises(ValueError, match="student is another object"):
        recipe.objective(quantize(teacher), teacher, batches=[batch()], phase=1, networks=made.networks)


@every_recipe
def test_a_missing_teacher(name: str):
    recipe, teacher = make(name), network()
    student = student_for(recipe, teacher)
    if isinstance(recipe.teacher, NoTeacher):
        recipe.objective(student, batches=[batch()])
    else:
        with pytest.raises(ValueError, match=f"recipe '{recipe.name}' needs a teacher; pass teacher="):
            recipe.objective(student, batches=[batch()])
        with pytest.raises(ValueError, match="teacher and student are the same object"):
            recipe.objective(student, student, batches=[batch()])


@every_recipe
def test_a_student_of_the_other_kind(name: str):
    recipe = make(name)
    wrong = network() if recipe.quantized else quantize(network())
    match = r"call fewbits.quantize\(model" if recipe.quantized else "got a quantized one"
    with pytest.raises(ValueError, match=match):
        recipe.objective(wrong, network(), batches=[batch()])


@every_recipe
def test_bad_batches(name: str):
    recipe, teacher = make(name), network()
    student = student_for(recipe, teacher)
    with pytest.raises(ValueError, match="batches holds no image"):
        recipe.objective(student, teacher, batches=[])
    for bad in ([{"image": batch()[0]}], [torch.randn(3, 8, 8)], torch.randn(4, 3, 8, 8)):
        with pytest.raises(TypeError, match="batches must hold images N x C x H x W"):
            recipe.objective(student, teacher, batches=bad)


def test_teachers_that_do_not_fit():
    teacher = network(classes=5)
    for recipe in (Logits(),):
        with pytest.raises(ValueError, match=r"different logits: \(3,\) and \(5,\)"):
            recipe.objective(quantize(network()), teacher, batches=[batch()])
    Features().objective(quantize(network()), teacher, batches=[batch()])  # features of equal width fit


@pytest.mark.parametrize("recipe", [QFD(), Joint(feature="none", beta=0), FTL().with_options(teacher=JointTeacher())])
def test_a_teacher_of_other_classes_does_not_learn_the_students_labels(recipe: Recipe):
    """Found: QFD fine-tuned a teacher of 5 classes on labels of 3, in silence."""
    said = "has 5 outputs and the student 3; pass a teacher for these classes, or use dtq, l2-sp or delta"
    with pytest.raises(ValueError, match=said):
        recipe.objective(quantize(network()), network(classes=5), batches=[batch()])


def test_names_and_options():
    with pytest.raises(ValueError, match=r"recipe must be one of float, plain, .*qfd.*, got 'qdf'"):
        make("qdf")
    with pytest.raises(ValueError, match="recipe 'qfd' has no option 'lambda'; it takes weight, bits, reduction"):
        make("qfd", {"lambda": 1})
    assert make("logits", {"temperature": 2.0}) == Logits(temperature=2.0)
    assert make("float") == Float()


def test_a_recipe_named_twice():
    """Found: "ftl+ftl" was one ftl, in silence."""
    with pytest.raises(ValueError, match=r"recipe 'ftl\+joint\+ftl' names 'ftl' 2 times; name it once"):
        make("ftl+joint+ftl")


def test_terms_that_two_recipes_share_count_once():
    """Found: delta+l2-sp decayed the head twice."""
    names = [term.name for term in make("delta+l2-sp").terms]
    assert names == ["cross_entropy", "delta", "head_decay", "source_distance"]
    apart = make("delta+l2-sp", {"delta.head_decay": 0.1}).terms
    assert [term.weight for term in apart if term.name == "head_decay"] == [0.1, 0.01]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("qfd", {"weight": -1}, "weight must be a number of 0 or more, got -1"),
        ("qfd", {"weight": "abc"}, "weight must be a number of 0 or more, got 'abc' (str)"),
        ("qfd", {"weight": None}, "weight must be a number of 0 or more, got None"),
        ("qfd", {"teacher_lr": -1}, "teacher_lr must be a number of 0 or more, got -1"),
        ("qfd", {"pooled": "maybe"}, "pooled must be true or false, got 'maybe' (str)"),
        ("qfd", {"reduction": "avg"}, "reduction must be one of mean, sum, got 'avg'"),
        ("qfd", {"bits": 4.5}, "bits must be a whole number from 1 to 8 or 32 or None, got 4.5 (float)"),
        ("logits", {"weight": math.nan}, "weight must be a number of 0 or more, got nan"),
        ("logits", {"temperature": 0}, "temperature must be a number above 0, got 0"),
        ("plain", {"label_smoothing": 2}, "label_smoothing must be a number from 0 to 1, got 2"),
        ("float", {"label_smoothing": -0.1}, "label_smoothing must be a number from 0 to 1, got -0.1"),
        ("ftl", {"stages": 99}, "stages must be text or a list, each text or None, got 99 (int)"),
        ("ftl", {"channel_dim": 2}, "channel_dim must be one of 1, -1, got 2"),
        ("progressive", {"bits": 3}, "bits must be a list, each a whole number from 1 to 8, got 3 (int); they fall"),
        ("dtq", {"taps": 3}, "taps must be text or a list, each text or None, got 3 (int)"),
        ("delta", {"measure": 1}, "measure must be true or false, got 1 (int)"),
        ("l2-sp", {"head_decay": -1}, "head_decay must be a number of 0 or more, got -1"),
        ("joint", {"stages": 0}, "stages must be a whole number of 1 or more, got 0"),
        ("joint", {"form": "all"}, "form must be one of mean_squared, norm, printed, got 'all'"),
        ("blockwise", {"branch": "x"}, "branch must be one of bottleneck, squeeze, grouped or None, got 'x'"),
        ("stochastic", {"separate": 0}, "separate must be true or false, got 0 (int)"),
        ("ftl+stochastic", {"stochastic.delta": 2}, "stochastic.delta must be a number above 0 and at most 1, got 2"),
        ("mine", {"power": "x"}, "power must be a whole number, got 'x' (str)"),
    ],
)
def test_options_are_checked_when_the_recipe_is_made(
    name: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
):
    """Found: wrong options were accepted, or failed behind the teacher's phase."""

    def mine(power: int = 1) -> Recipe:
        return Recipe("mine")

    monkeypatch.setitem(RECIPES, "mine", mine)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(said)}"):
        make(name, options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: QFD(weight="x"),  # type: ignore[arg-type]
        lambda: QFD(teacher_lr=-1),
        lambda: Logits(temperature=0),
        lambda: Plain(label_smoothing=2),
        lambda: Plain(math.nan),
        lambda: CrossEntropy(-1.0),
        lambda: CrossEntropy(teaches="pupil"),  # type: ignore[arg-type]
        lambda: Group("student", lr=-1),
        lambda: Phase("x", 0.0, (CrossEntropy(),)),
        lambda: Phase("x", 1.0, CrossEntropy()),  # type: ignore[arg-type]
        lambda: QFD().with_options(teacher=QFD()),
        lambda: QFD().with_options(terms=("cross_entropy",)),
    ],
)
def test_nothing_wrong_is_made_from_python(call: Any):
    with pytest.raises((TypeError, ValueError), match="must be"):
        call()


def test_what_is_no_recipe_does_not_add_up():
    for other in (3, "ftl", QFD):
        with pytest.raises(TypeError, match=r"other must be a Recipe, got .*; for example FTL\(\) \+ Joint\(\)"):
            QFD() + other


def test_one_name_is_a_list_of_one():
    """Found: DTQ's taps="layer1" became a tap for each letter."""
    assert make("dtq", {"taps": "layer1"}) == make("dtq", {"taps": ["layer1"]})
    assert make("delta", {"taps": "layer1"}) == make("delta", {"taps": ["layer1"]})
    assert make("ftl", {"stages": "layer1, layer2"}) == make("ftl", {"stages": ["layer1", "layer2"]})


def test_what_an_objective_refuses():
    teacher = network()
    made = Logits().objective(quantize(teacher), teacher, batches=[batch()])
    with pytest.raises(ValueError, match="lr must be a number of 0 or more, got -1"):
        made.param_groups(lr=-1)
    with pytest.raises(ValueError, match=r"progress must be a number from 0 to 1, got 2\.0"):
        made.set_progress(2.0, 5)
    with pytest.raises(TypeError, match=r"labels must be int64.*got torch\.float32; convert them"):
        made(batch()[0], batch()[1].float())
    with pytest.raises(TypeError, match="student must be a network"):
        Plain().objective("resnet20", batches=[batch()])  # type: ignore[arg-type]


def test_one_anatomy_for_both_networks():
    """The last linear layer of the registration is not the classifier here."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier, self.unused = nn.Conv2d(3, 4, 1), nn.Linear(4, 3), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x).relu().mean((2, 3)))

    teacher = TwoHeads()
    stated = Anatomy(stages=("body",), blocks=(), head="classifier")
    options: dict[str, Any] = {"keep": ["unused"], "residual": None}
    recipe, student = QFD(bits=2), quantize(teacher, **options)
    first = recipe.objective(student, teacher, batches=[batch()], anatomy=stated)
    assert first.networks.anatomy("teacher") == first.networks.anatomy("student") == stated
    second = recipe.objective(student, teacher, batches=[batch()], phase=1, networks=first.networks)
    assert bool(second(*batch()).terms["quantized_features"] > 0)
    made = Features().objective(
        quantize(teacher, **options), teacher, batches=[batch()], anatomy={"teacher": stated} | {"student": stated}
    )
    assert made.networks.anatomy("student") == stated
