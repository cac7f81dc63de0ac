"""Joint distillation, recomputed: both objectives, Q on the teacher's maps, and no gradient that crosses."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.convert import quantize
from fewbits.distill import CrossEntropy, LogitDistance, Objective
from fewbits.distill.weight_terms import HeadDecay, SourceDistance
from fewbits.quantizers import Quantizer, QuantSpec, build
from fewbits.recipes import DELTA, DTQ, FTL, L2SP, QFD, Joint, JointTeacher, Plain
from fewbits.recipes.dtq import AttentiveAlignment, SourceClasses
from fewbits.recipes.transfer_rivals import FixedAlignment

from .zhuang import CLASSES, batch, network


def begun(recipe: Any = None, bits: int = 2, **options: Any) -> Objective:
    teacher = network()
    student = quantize(teacher, bits, bits, residual=None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return (recipe or Joint(**options)).objective(student, teacher, batches=[batch()])


def maps(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Both stages' outputs and the logits, without any hook."""
    children = dict(model.named_children())
    first = children["layer1"](children["relu"](children["conv"](x)))
    second = children["layer2"](first)
    return [first, second], children["head"](children["flatten"](children["pool"](second)))


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch and places of the squared difference of normalised maps, by loops."""
    total = torch.zeros(())
    num, channels, height, width = student.shape
    for i in range(num):
        flat = []
        for feature in (student[i], teacher[i]):
            values = [
                sum((feature[c, y, x].abs() for c in range(channels)), torch.zeros(()))
                for y in range(height)
                for x in range(width)
            ]
            norm = torch.sqrt(sum((v * v for v in values), torch.zeros(())))
            flat.append([v / norm for v in values])
        total = total + sum(((a - b) ** 2 for a, b in zip(*flat, strict=True)), torch.zeros(())) / (height * width)
    return total / num


def kl(fixed: Tensor, learner: Tensor) -> Tensor:
    p, q = torch.softmax(fixed, 1), torch.softmax(learner, 1)
    return sum(
        (p[i, c] * (p[i, c] / q[i, c]).log() for i in range(len(p)) for c in range(CLASSES)), torch.zeros(())
    ) / len(p)


def quantizers(made: Objective, name: str) -> list[Quantizer]:
    return list(made.networks.helpers[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("taught", ["student", "teacher"])
def test_each_side(taught: str):
    """v3 Eqs. 6 to 9: values and gradients of one network, the other one a constant."""
    made = begun()
    images, labels = batch(3)
    losses = made(images, labels)
    losses.total.backward()
    networks = made.networks
    got = {n: p.grad.clone() for n, p in networks.network(taught).named_parameters() if p.grad is not None}  # type: ignore[arg-type]
    networks.zero_grad()
    maps_s, logits_s = maps(networks.student, images)
    maps_t, logits_t = maps(networks.teacher, images)  # type: ignore[arg-type]
    if taught == "student":
        maps_t, logits_t = [m.detach() for m in maps_t], logits_t.detach()
    else:
        maps_s, logits_s = [m.detach() for m in maps_s], logits_s.detach()
    rounded = [q(m) for q, m in zip(quantizers(made, "attention"), maps_t, strict=True)]
    assert all(len(m.unique()) <= 4 for m in rounded)
    own, other = (logits_s, logits_t) if taught == "student" else (logits_t, logits_s)
    cross = sum((-torch.log_softmax(own, 1)[i, y] for i, y in enumerate(labels)), torch.zeros(())) / 3
    att = attention(maps_s[0], rounded[0]) + attention(maps_s[1], rounded[1])
    total = (0.5 if taught == "student" else 1.0) * cross + 0.5 * kl(other, own) + 50.0 * att
    prefix = "" if taught == "student" else "teacher_"
    torch.testing.assert_close(losses.terms[f"{prefix}attention"], att.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses.terms[f"{prefix}logits"], kl(other, own).detach(), rtol=1e-4, atol=1e-6)
    total.backward()
    wanted = {n: p.grad for n, p in networks.network(taught).named_parameters() if p.grad is not None}  # type: ignore[arg-type]
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=2e-3, atol=1e-5, msg=name)


def test_the_directions_of_the_two_kls_differ():
    losses = begun()(*batch())
    assert not math.isclose(float(losses.terms["logits"]), float(losses.terms["teacher_logits"]), rel_tol=1e-4)


def test_who_is_trained():
    made = begun()
    assert made.networks.student.training
    assert made.networks.teacher.training  # its batch norm moves too
    assert [(g.network, g.lr) for g in made.phase.trains] == [("student", 1.0), ("teacher", 0.2)]
    rates = {g["name"].split(".")[0]: g["lr"] for g in made.param_groups(1.0)}
    assert rates["teacher"] == pytest.approx(0.2)
    frozen = begun(train_teacher=False)
    assert not frozen.networks.teacher.training
    assert [g.network for g in frozen.phase.trains] == ["student"]


def test_the_callers_teacher_stays():
    teacher = network()
    student, before = quantize(teacher, 2, 2), copy.deepcopy(teacher.state_dict())
    made = Joint().objective(student, teacher, batches=[batch()])
    optimizer = torch.optim.SGD(made.param_groups(0.1))
    made(*batch()).total.backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in made.networks.teacher.state_dict().items())


def test_one_step_is_the_authors_order_of_updates():
    """Student first, then the teacher against the student's output from before: no parameter is shared."""
    images, labels = batch()
    together, apart = begun(), None
    apart = copy.deepcopy(together.networks)
    optimizer = torch.optim.SGD(together.param_groups(0.1))
    together(images, labels).total.backward()
    optimizer.step()
    wanted = {name: copy.deepcopy(together.networks.network(name).state_dict()) for name in ("student", "teacher")}  # type: ignore[arg-type]
    together.close()
    objective = Objective(apart, together.phase)
    outputs = objective(images, labels)
    for name, rate in (("student", 0.1), ("teacher", 0.02)):
        parameters = [p for p in apart.network(name).parameters() if p.requires_grad]  # type: ignore[arg-type]
        gradients = torch.autograd.grad(outputs.total, parameters, retain_graph=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(rate * gradient)
        for key, value in apart.network(name).state_dict().items():  # type: ignore[arg-type]
            torch.testing.assert_close(value, wanted[name][key])


def test_quantized_maps_follow_the_students_bits():
    assert [q.bits for q in quantizers(begun(bits=3), "attention")] == [3, 3]
    assert [q.bits for q in quantizers(begun(Joint(bits=4)), "attention")] == [4, 4]
    assert "attention" not in begun(Joint(bits=32)).networks.helpers
    unit = begun(Joint(grid="unit"))
    x = torch.linspace(-1, 3, 101)
    assert quantizers(unit, "attention")[0](x).unique().tolist() == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert not any(p.requires_grad for p in unit.networks.helpers.parameters())


@pytest.mark.parametrize("recipe", [Joint(), FTL(distance="l2", quantized_teacher=True)])
def test_the_grids_are_fitted_to_all_batches(recipe: Any):
    """Found: their ranges were those of the first two images."""
    teacher, batches = network(), [batch(3)[0], 5.0 * batch(3)[0]]
    made = recipe.objective(quantize(teacher, 2, 2, residual=None), teacher, batches=batches)
    with torch.no_grad():
        both = [maps(teacher, images)[0] for images in batches]
    for index, held in enumerate(quantizers(made, recipe.terms[-1].name)):
        wanted = build(QuantSpec("lsq", 2, "activation"), 1, 1)
        wanted.calibrate(torch.cat([stages[index] for stages in both]))
        torch.testing.assert_close(held.step, wanted.step)
    assert made.networks.images == []


def test_hint():
    """CVPR 2018: half the mean squared distance of the feature itself and the quantized one."""
    made = begun(Joint(feature="hint", gamma=0.1, stages=1))
    images, labels = batch()
    losses = made(images, labels)
    (_, student), _ = maps(made.networks.student, images)
    (_, teacher), _ = maps(made.networks.teacher, images)  # type: ignore[arg-type]
    wanted = 0.5 * (student - quantizers(made, "hint")[0](teacher)).square().mean()
    torch.testing.assert_close(losses.terms["hint"], wanted.detach())
    assert [t.name for t in Joint(feature="none").terms] == ["cross_entropy", "logits"]


def test_each_feature_term_has_its_own_default_weight():
    """Found: the hint, a mean squared error, took the attention maps' 50."""
    assert [Joint(feature=kind).terms[-1].weight for kind in ("attention", "hint")] == [50.0, 0.1]
    assert [Joint(feature=kind, gamma=5).terms[-1].weight for kind in ("attention", "hint")] == [5, 5]
    assert Joint(gamma=0).terms[-1].weight == 0
    assert Joint() == Joint(gamma=50)


def test_any_recipe_with_a_teacher_that_learns():
    recipe = FTL().with_options(teacher=JointTeacher(lr=0.1))
    made = begun(recipe)
    names = list(made(*batch()).terms)
    assert "teacher_cross_entropy" in names
    assert len(names) == 4
    alone = begun(FTL().with_options(teacher=JointTeacher(mirror=False)))
    assert len(alone(*batch()).terms) == 3
    assert (Plain() + Joint()).teacher == JointTeacher()


def test_only_terms_with_another_side_are_mirrored():
    """Found: the teacher learned L2-SP's and DTQ's terms as well, with the student as its source."""
    one_sided = (HeadDecay(), SourceDistance(), FixedAlignment(), AttentiveAlignment(), SourceClasses())
    terms = JointTeacher().terms((CrossEntropy(), LogitDistance(), *one_sided))
    assert [type(term) for term in terms] == [CrossEntropy, LogitDistance]
    assert all(term.teaches == "teacher" for term in terms)


def test_l2_sp_holds_to_the_source_while_the_teacher_learns():
    teacher = network()
    student = quantize(teacher, 2, 2, residual=None)
    made = (L2SP(0.5) + Joint()).objective(student, teacher, batches=[batch()])
    assert [name for name in made(*batch()).terms if "source" in name or "decay" in name] == [
        "source_distance",
        "head_decay",
    ]
    optimizer = torch.optim.SGD(made.param_groups(0.1))
    made(*batch()).total.backward()
    optimizer.step()
    assert not torch.equal(made.networks.network("teacher").get_parameter("conv.weight"), teacher.conv.weight)
    body = [(n, p) for n, p in teacher.named_parameters() if not n.startswith("head.")]
    wanted = 0.5 * sum(float((student.get_parameter(n) - p).detach().square().sum()) for n, p in body)
    assert float(made(*batch()).terms["source_distance"]) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 0


@pytest.mark.parametrize("source", [DELTA(), DTQ()])
@pytest.mark.parametrize("trains", [Joint(), QFD()])
def test_what_compares_with_the_source_network_refuses_a_teacher_that_learns(source: Any, trains: Any):
    with pytest.raises(ValueError, match=r"the teacher has to stay as it is, but \w+ trains it; add a recipe that"):
        source + trains
    assert (source + Joint(train_teacher=False)).name == f"{source.name}+joint"


def test_other_numbers_of_stages():
    with pytest.raises(ValueError, match="stages must be at most 2"):
        begun(Joint(stages=3))


@pytest.mark.parametrize("options", [{"feature": "maps"}, {"grid": "float"}])
def test_bad_options(options: dict[str, Any]):
    with pytest.raises(ValueError, match="must be"):
        Joint(**options)
