"""The objective: who runs, who learns, what is compared, and that the networks come out as they went in."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewbits.anatomy import Anatomy
from fewbits.calibration import calibrate
from fewbits.convert import quantize
from fewbits.distill import (
    CrossEntropy,
    FeatureDistance,
    Group,
    LogitDistance,
    Networks,
    Objective,
    Phase,
    Step,
    Tap,
    Term,
)
from fewbits.distill.logit_losses import cross_entropy, kl_divergence
from fewbits.precision import Fixed, Precision
from fewbits.quantizers import Quantizer
from fewbits.recipes import QFD, RECIPES, Logits, Plain, make

FUNCTION_OBJECTS = "ignore:.*should not be instantiated:DeprecationWarning"


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)


def network(classes: int = 3, width: int = 6) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


HEAD = "7"


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])


def networks(teacher: nn.Module | None = None) -> Networks:
    images, _ = batch()
    student = quantize(network(), 4, 4)
    calibrate(student, [images])
    return Networks(student, teacher or network(), images[:2])


def objective(*terms: Term, held: Networks | None = None, **options: Any) -> Objective:
    return Objective(held or networks(), Phase("phase", 1.0, terms, **options))


@dataclass(frozen=True)
class WithHelper(Term):
    """A term that trains a module along."""

    name: ClassVar[str] = "with_helper"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        return (Tap.feature(networks, "student"),)

    def helper(self, networks: Networks) -> nn.Module:
        return nn.Linear(6, 2)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        assert helper is not None
        return helper(step.features[taps[0]]).square().mean()


# What it computes


def test_the_total_is_the_weighted_sum_of_the_terms():
    images, labels = batch()
    made = objective(CrossEntropy(0.5), LogitDistance(2.0, temperature=3.0), FeatureDistance(0.25, reduction="mean"))
    made.eval()
    losses = made(images, labels)
    student, teacher = made.networks.student, made.networks.teacher
    assert list(losses.terms) == ["cross_entropy", "logits", "features"]
    torch.testing.assert_close(losses.terms["cross_entropy"], cross_entropy(student(images), labels))
    torch.testing.assert_close(losses.terms["logits"], kl_divergence(teacher(images), student(images), 3.0))
    features = [nn.Sequential(*list(net)[:-1])(images) for net in (student, teacher)]
    torch.testing.assert_close(losses.terms["features"], (features[0] - features[1]).square().mean())
    total = 0.5 * losses.terms["cross_entropy"] + 2 * losses.terms["logits"] + 0.25 * losses.terms["features"]
    torch.testing.assert_close(losses.total, total)
    assert torch.equal(losses.logits, student(images))
    assert losses.total.requires_grad
    assert not any(value.requires_grad for value in (*losses.terms.values(), losses.logits))


def test_a_teacher_alone_in_bfloat16():
    images, labels = batch()
    made = objective(CrossEntropy(), LogitDistance(), FeatureDistance(reduction="mean"))
    seen: dict[str, list[torch.dtype]] = {"student": [], "teacher": []}
    for name, dtypes in seen.items():
        first = next(m for m in made.networks.network(name).modules() if isinstance(m, nn.Conv2d | nn.Linear))
        first.register_forward_hook(lambda *of, dtypes=dtypes: dtypes.append(of[-1].dtype))
    exact = made(images, labels)
    answers = made.teach(images)
    made.teacher_dtype = torch.bfloat16
    rough, rounded = made(images, labels), made.teach(images)
    assert seen["student"] == [torch.float32] * 2
    assert seen["teacher"] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert all(answer.dtype == torch.float32 for answer in rounded)
    for given, wanted in zip(rounded, answers, strict=True):
        assert not torch.equal(given, wanted)
        torch.testing.assert_close(given, wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(rough.total, exact.total, rtol=0.05, atol=0.01)
    kept = made(images, labels, rounded)
    assert torch.equal(kept.total, rough.total)


def test_equal_terms_keep_their_own_names():
    made = objective(CrossEntropy(), CrossEntropy(0.5, label_smoothing=0.1), CrossEntropy(0.5, label_smoothing=0.2))
    assert list(made(*batch()).terms) == ["cross_entropy", "cross_entropy_more", "cross_entropy_more_more"]


def test_no_term():
    with pytest.raises(ValueError, match="terms is empty"):
        objective()


@pytest.mark.parametrize("teaches", ["student", "teacher"])
def test_the_other_network_is_a_constant(teaches: Any):
    """Both train, so that nothing but the term itself keeps the gradient from crossing."""
    other = "teacher" if teaches == "student" else "student"
    terms = (LogitDistance(teaches=teaches), FeatureDistance(teaches=teaches))
    made = objective(*terms, trains=(Group("student"), Group("teacher")))
    made(*batch()).total.backward()
    assert all(p.grad is None for p in made.networks.network(other).parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in made.networks.network(teaches).parameters())


def test_each_side_learns_from_its_own_terms():
    """Joint training: student and teacher compare with each other, and neither term reaches across."""
    images, labels = batch()
    terms = (CrossEntropy(), LogitDistance(0.5), CrossEntropy(teaches="teacher"), LogitDistance(0.5, teaches="teacher"))
    made = objective(*terms, trains=(Group("student"), Group("teacher")))
    losses = made(images, labels)
    assert list(losses.terms) == ["cross_entropy", "logits", "teacher_cross_entropy", "teacher_logits"]
    losses.total.backward()
    got = [p.grad.clone() for p in made.networks.teacher.parameters()]
    made.networks.zero_grad()
    student, teacher = made.networks.student(images).detach(), made.networks.teacher(images)
    (cross_entropy(teacher, labels) + 0.5 * kl_divergence(student, teacher)).backward()
    for gradient, parameter in zip(got, made.networks.teacher.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


# Who runs


def count_runs(made: Objective) -> dict[str, int]:
    runs = {"student": 0, "teacher": 0}
    for name in runs:
        made.networks.network(name).register_forward_hook(  # type: ignore[arg-type]
            lambda module, args, output, name=name: runs.__setitem__(name, runs[name] + 1)
        )
    made(*batch())
    return runs


def test_a_network_that_no_term_reads_is_not_run():
    assert count_runs(objective(CrossEntropy())) == {"student": 1, "teacher": 0}
    assert count_runs(objective(CrossEntropy(), LogitDistance(), FeatureDistance())) == {"student": 1, "teacher": 1}
    only_teacher = objective(CrossEntropy(teaches="teacher"), trains=(Group("teacher"),))
    assert count_runs(only_teacher) == {"student": 0, "teacher": 1}


def test_a_frozen_teacher():
    held = networks()
    teacher = held.teacher
    teacher[3].bias.requires_grad_(False)  # the user's own choice has to come back as well
    before = copy.deepcopy(teacher.state_dict())
    flags = [p.requires_grad for p in teacher.parameters()]
    made = objective(CrossEntropy(), LogitDistance(), FeatureDistance(), held=held)
    made.train()
    for _ in range(2):
        made(*batch()).total.backward()
    assert made.networks.student.training
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    made.close()
    assert [p.requires_grad for p in teacher.parameters()] == flags


def hooks(module: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


def test_close_takes_every_hook_off():
    held = networks()
    before = hooks(held)
    made = objective(CrossEntropy(), FeatureDistance(), held=held)
    assert hooks(held) != before
    made.close()
    assert hooks(held) == before
    made.close()


def test_an_objective_that_fails_leaves_nothing_behind():
    """Found: after a mismatch the caller's teacher stayed frozen and hooked."""
    held = networks(network(width=5))
    before = hooks(held)
    with pytest.raises(ValueError, match="different features"):
        objective(FeatureDistance(), held=held)
    assert hooks(held) == before
    assert all(p.requires_grad for p in held.teacher.parameters())


def test_the_next_objective_ends_the_one_before():
    """Found: without close(), the student that the teacher's phase froze had no parameter to train."""
    held = networks()
    first = objective(CrossEntropy(teaches="teacher"), held=held, trains=(Group("teacher"),))
    assert not any(p.requires_grad for p in held.student.parameters())
    second = objective(CrossEntropy(), LogitDistance(), held=held)
    assert all(p.requires_grad for p in held.student.parameters())
    assert not any(p.requires_grad for p in held.teacher.parameters())
    first.close()  # late, and without effect
    assert not any(p.requires_grad for p in held.teacher.parameters())
    second(*batch())
    assert held.holders == [second]


def test_modes():
    made = objective(CrossEntropy(), LogitDistance())
    assert made.training
    assert made.networks.student.training
    made.eval()
    assert not made.networks.student.training
    made.train()
    assert made.networks.student.training
    assert not made.networks.teacher.training


def test_trying_out_leaves_no_trace():
    """The student's batch norm and the random state stay as they were before the first step."""
    held = networks()
    before, state = copy.deepcopy(held.state_dict()), torch.get_rng_state()
    objective(CrossEntropy(), held=held)
    assert all(torch.equal(value, before[key]) for key, value in held.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_follows_the_phase():
    made = objective(CrossEntropy(), precision=Fixed(Precision(weights=True, activations=False)))
    quantizers = [m for m in made.networks.student.modules() if isinstance(m, Quantizer)]
    assert {bool(q.enabled) for q in quantizers if q.spec.role == "activation"} == {False}
    assert {bool(q.enabled) for q in quantizers if q.spec.role == "weight"} == {True}


# Who is trained


def trained(made: Objective, **options: Any) -> list[nn.Parameter]:
    return [p for group in made.param_groups(0.1, **options) for p in group["params"]]


@pytest.mark.parametrize("trains", [("student",), ("teacher",), ("student", "teacher")], ids="+".join)
def test_param_groups_hold_every_trainable_parameter_once(trains: tuple[Any, ...]):
    terms = (CrossEntropy(), CrossEntropy(teaches="teacher"), WithHelper())
    made = objective(*terms, trains=tuple(Group(name) for name in trains))
    wanted = [p for name in trains for p in made.networks.network(name).parameters()]
    wanted += list(made.networks.helpers.parameters())
    got = trained(made)
    assert len(got) == len({id(p) for p in got})
    assert {id(p) for p in got} == {id(p) for p in wanted} == {id(p) for p in made.parameters() if p.requires_grad}
    torch.optim.SGD(made.param_groups(0.1), momentum=0.9)


def test_rates_and_decay():
    made = objective(CrossEntropy(), WithHelper(), trains=(Group("student", 0.5, 0.1),))
    groups = {g["name"]: g for g in made.param_groups(0.2, weight_decay=1e-4)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "student.weights": (0.1, 1e-4),
        "student.no_decay": (0.1, 0.0),
        "student.quantizers": (pytest.approx(0.01), 0.0),
        "helpers": (0.2, 0.0),
    }
    assert all(p.ndim > 1 for p in groups["student.weights"]["params"])
    helper = [g["lr"] for g in made.param_groups(0.2, helper_lr=0.0) if g["name"] == "helpers"]
    assert helper == [0.0]  # found: a rate of zero was taken for none


def test_pact_s_alpha_decays():
    images, _ = batch()
    student = quantize(network(), 4, 4, quantizer="pact")
    calibrate(student, [images])
    made = objective(CrossEntropy(), held=Networks(student, None, images[:2]))
    groups = {g["name"]: g for g in made.param_groups(0.2, weight_decay=1e-4)}
    assert groups["student.quantizer_decayed"]["weight_decay"] == 1e-4
    assert [p.item() for p in groups["student.quantizer_decayed"]["params"]] == [
        student[3].input_quantizer.alpha.item()
    ]


def test_helpers_last_and_stay_out_of_the_student():
    held = networks()
    first = objective(CrossEntropy(), WithHelper(), held=held)
    helper = held.helpers["with_helper"]
    assert not any("helper" in key for key in held.student.state_dict())
    second = objective(CrossEntropy(), WithHelper(), held=first.networks)
    assert second.networks.helpers["with_helper"] is helper


def test_a_frozen_student_is_an_error():
    """A teacher frozen by hand gives a frozen copy: only the steps would train, in silence."""
    teacher = network().requires_grad_(False)
    student = quantize(teacher, 4, 4)
    with pytest.raises(ValueError, match=r"no weight of the student requires a gradient.*requires_grad_\(True\)"):
        Plain().objective(student, batches=[batch()])
    Plain().objective(student.requires_grad_(True), batches=[batch()])


# Bad input


def test_shapes_that_do_not_fit_are_found_at_once():
    with pytest.raises(ValueError, match=r"different logits: \(3,\) and \(5,\) per image"):
        objective(LogitDistance(), held=networks(network(classes=5)))
    with pytest.raises(ValueError, match=r"different features: \(6,\) and \(8,\) per image"):
        objective(FeatureDistance(), held=networks(network(width=8)))
    objective(CrossEntropy(), held=networks(network(classes=5, width=8)))  # nothing compares them


def test_labels_out_of_range():
    images, _ = batch()
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        objective(CrossEntropy())(images, torch.tensor([0, 1, 2, 3]))


def test_a_missing_teacher():
    images, _ = batch()
    held = Networks(networks().student, None, images[:2])
    with pytest.raises(ValueError, match=r"needs a teacher; pass teacher="):
        objective(LogitDistance(), held=held)


def test_a_tap_on_nothing():
    @dataclass(frozen=True)
    class Astray(CrossEntropy):
        def taps(self, networks: Networks) -> tuple[Tap, ...]:
            return (Tap("teacher", "layer9", "output"),)

    with pytest.raises(ValueError, match="the teacher has no module 'layer9' to tap"):
        objective(Astray())


# In somebody's own loop, and compiled


def loader(num: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(num):
        yield batch()


def test_a_user_s_own_loop():
    teacher = network()
    student = quantize(teacher, 2, 2)
    before = copy.deepcopy(student.state_dict())
    objective = Logits().objective(student, teacher, batches=list(loader()))
    optimizer = torch.optim.SGD(objective.param_groups(lr=0.01), momentum=0.9)
    for step, (images, labels) in enumerate(loader()):
        objective.set_progress(step / 3, step)
        losses = objective(images, labels)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [key for key, _ in student.named_parameters() if not torch.equal(student.state_dict()[key], before[key])]
    assert {"0.weight", "3.weight", "3.weight_quantizer.step", "7.bias"} <= set(moved)
    assert losses.logits.shape == (4, 3)


def test_a_user_s_own_loop_over_phases():
    """design.md's words: objective(..., phase=1, networks=previous.networks), without close()."""
    teacher, recipe = network(), QFD(bits=2)
    student = quantize(teacher, 2, 2)
    held = None
    for phase in range(len(recipe.phases())):
        made = recipe.objective(student, teacher, batches=list(loader()), phase=phase, networks=held)
        optimizer = torch.optim.SGD(made.param_groups(lr=0.01), momentum=0.9)
        for images, labels in loader():
            made(images, labels).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        held = made.networks
    assert made.taught is student


def each_phase(name: str, images: Tensor) -> Iterator[Objective]:
    """The objectives of a recipe, one after the other, each with a compiler that has seen nothing."""
    teacher, recipe = network(), make(name)
    student = quantize(teacher, 4, 4) if recipe.quantized else network()
    held = None
    for phase in range(len(recipe.phases())):
        torch._dynamo.reset()
        parts = Anatomy(stages=("3", "5"), blocks=("3",), head="7")
        made = recipe.objective(student, teacher, batches=[images], phase=phase, networks=held, anatomy=parts)
        held = made.networks
        made.zero_grad()  # of the phase before
        yield made
    torch._dynamo.reset()


@pytest.mark.filterwarnings(FUNCTION_OBJECTS)
@pytest.mark.filterwarnings("ignore:no quantized layer reads what 3 give:UserWarning")  # FTL: a ReLU, then pooling
@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"blockwise", "best"}))  # they need residual blocks
def test_every_phase_is_one_compiled_graph(name: str):
    """The same losses and gradients as without the compiler."""
    images, labels = batch()
    for made in each_phase(name, images):
        made.eval()  # batch statistics that move would tell the two runs apart
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        got, wanted = compiled(images, labels), made(images, labels)
        torch.testing.assert_close(got.total, wanted.total)
        torch.testing.assert_close(got.terms, wanted.terms)
        got.total.backward()
        gradients = [p.grad for p in trained(made)]
        made.zero_grad()
        made(images, labels).total.backward()
        for one, parameter in zip(gradients, trained(made), strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)
        made.train()
        torch.compile(made, backend="aot_eager", fullgraph=True)(images, labels).total.backward()


@pytest.mark.filterwarnings(FUNCTION_OBJECTS)
@pytest.mark.filterwarnings("ignore:no quantized layer reads what 3 give:UserWarning")
@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"blockwise", "best"}))
def test_a_phase_compiles_once_whatever_its_schedule_does(name: str):
    """Precision that moves or is drawn anew, an evaluation in between: the graph stays."""
    images, labels = batch()
    for made in each_phase(name, images):
        graphs = 0

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
            nonlocal graphs
            graphs += 1
            return graph

        compiled = torch.compile(made, backend=count, fullgraph=True)
        gates = set()
        for step in range(8):
            made.set_progress(step / 8, step)
            compiled(images, labels).total.backward()
            made.zero_grad()
            gates.add(tuple(bool(q.enabled) for q in made.networks.student.modules() if isinstance(q, Quantizer)))
            if step == 4:
                made.networks.student.eval()(images)
                made.forget_features()
                made.train()
        assert graphs == 1
        assert len(gates) > 1 or name != "stochastic"
