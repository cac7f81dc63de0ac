"""FTL against slow loops and manual hooks: which tensor is compared, with what gradient, and every arm of it."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.anatomy import readers
from fewbits.convert import float_state, quantize
from fewbits.distill import Objective, Tap
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.recipes import FTL, Features, JointTeacher, Logits, Recipe, make
from fewbits.recipes.ftl import FeatureTransfer

STAGES = ("layer1", "layer2", "layer3")
BEHIND = {"layer1": "layer2.0.conv1.input_quantizer", "layer2": "layer3.0.conv1.input_quantizer"}
# Of torch.compile itself, inside PyTorch.
FUNCTION_OBJECTS = "ignore:Attribute .* of type .*function.*:UserWarning"


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 10)


def network(projection: bool = False, blocks: int = 1) -> nn.Module:
    model = CifarResNet((blocks,) * 3, (4, 8, 16), projection, num_classes=3, architecture="test")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: signs of both kinds, other scales
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def signed(model: nn.Module) -> nn.Module:
    """Binary activations need values of both signs: behind a ReLU every sign is +1."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.PReLU())
    return model


def batch(num: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, 8, 8), torch.arange(num) % 3


def objective(recipe: Recipe, teacher: nn.Module | None = None, **plan: Any) -> Objective:
    teacher = teacher or network()
    student = quantize(teacher, **{"weights": 2, "activations": 2, **plan})
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "quantizer" not in name and "stream" not in name:
                parameter.add_(0.1 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    return recipe.objective(student, teacher, batches=[batch(8)])


def only(**options: Any) -> Recipe:
    """The transfer term alone, so that gradients are its own."""
    recipe = FTL(**options)
    return recipe.with_options(terms=recipe.terms[1:2])


def kept(model: nn.Module, places: dict[str, str], images: Tensor) -> dict[str, Tensor]:
    """What manual hooks see: {module: side} in, tensors out."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, side in places.items():
        module = model.get_submodule(name)
        if side == "input":
            handles.append(
                module.register_forward_pre_hook(lambda m, args, n=name: seen.__setitem__(n, args[0].detach()))
            )
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, n=name: seen.__setitem__(n, o.detach())))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def slow_distance(student: Tensor, teacher: Tensor) -> float:
    """mean_i 1 - <c(u), c(v)> / (||c(u)|| ||c(v)||), jointly over C x H x W of sample i."""
    total = 0.0
    for u, v in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        u = [x - sum(u) / len(u) for x in u]
        v = [x - sum(v) / len(v) for x in v]
        dot = sum(a * b for a, b in zip(u, v, strict=True))
        total += 1 - dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))
    return total / len(student)


@pytest.mark.parametrize("residual", [8, None])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("projection", [False, True])
def test_the_loss_by_manual_hooks(side, residual, projection):
    """The student's tensor is what the next stage's quantizer gives or takes; the last stage's is its output."""
    made = objective(FTL(3.0, side=side), network(projection), residual=residual).eval()
    images, labels = batch()
    losses = made(images, labels)
    students = kept(made.networks.student, {**dict.fromkeys(BEHIND.values(), side), "layer3": "output"}, images)
    teachers = kept(made.networks.teacher, dict.fromkeys(STAGES, "output"), images)
    places = (*BEHIND.values(), "layer3")
    wanted = sum(slow_distance(students[p], teachers[s]) for p, s in zip(places, STAGES, strict=True)) / 3
    assert losses.terms["feature_transfer"].item() == pytest.approx(wanted, rel=1e-4)
    assert losses.total.item() == pytest.approx(losses.terms["cross_entropy"].item() + 3 * wanted, rel=1e-4)
    assert 0.01 < wanted < 2
    # What is compared behind the quantizer is on its grid of four levels, what is compared before it is not.
    levels = len(students[BEHIND["layer1"]].unique())
    assert levels <= 4 if side == "output" else levels > 8
    # Before it is what the stage gives, behind its stream quantizer.
    outputs = kept(made.networks.student, dict.fromkeys(STAGES, "output"), images)
    if side == "input":
        assert torch.equal(students[BEHIND["layer1"]], outputs["layer1"])
    if residual == 8:
        assert all(len(outputs[stage].unique()) <= 256 for stage in STAGES)


def test_the_gradient_behind_and_before_the_quantizer():
    """At S: -(v^ - cos u^) / ||c(u)|| / N. At A: the same where DoReFa does not clip, exactly zero where it does."""
    made = objective(only(stages=["layer1"]), quantizer="dorefa", residual=None).eval()
    images, labels = batch()
    quantizer = made.networks.student.get_submodule(BEHIND["layer1"])
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        for tensor in (args[0], output):
            tensor.retain_grad()
            seen.append(tensor)

    quantizer.register_forward_hook(keep)
    made(images, labels).total.backward()
    before, behind = seen
    target = kept(made.networks.teacher, {"layer1": "output"}, images)["layer1"]
    wanted = []
    for u, v in zip(behind.detach().flatten(1).tolist(), target.flatten(1).tolist(), strict=True):
        u = [x - sum(u) / len(u) for x in u]
        v = [x - sum(v) / len(v) for x in v]
        norms = math.sqrt(sum(x * x for x in u)), math.sqrt(sum(x * x for x in v))
        u, v = [x / norms[0] for x in u], [x / norms[1] for x in v]
        cos = sum(a * b for a, b in zip(u, v, strict=True))
        wanted.append([-(b - cos * a) / norms[0] / len(images) for a, b in zip(u, v, strict=True)])
    torch.testing.assert_close(behind.grad.flatten(1), torch.tensor(wanted), rtol=1e-3, atol=1e-7)
    inside = (before > 0) & (before < 1)
    assert 0 < int(inside.sum()) < before.numel()
    torch.testing.assert_close(before.grad[inside], behind.grad[inside])
    assert not before.grad[before > 1].any()
    # Nothing behind the tap is moved by it, nor the teacher.
    student = made.networks.student
    assert all(p.grad is None or not p.grad.any() for p in student.get_submodule("layer3").parameters())
    assert bool(student.conv1.weight.grad.any())
    assert all(p.grad is None for p in made.networks.teacher.parameters())


def test_before_the_quantizer_clipped_elements_are_reached_as_well():
    """Pitfall 7: the alternative to compare with when most of a tap is clipped."""
    reached = {}
    for side in ("output", "input"):
        torch.manual_seed(0)
        made = objective(only(stages=["layer1"], side=side), quantizer="dorefa", residual=None).eval()
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, seen: list[Tensor] = seen) -> None:
            output.retain_grad()
            seen.append(output)

        made.networks.student.get_submodule("layer1").register_forward_hook(keep)
        torch.manual_seed(1)
        made(*batch()).total.backward()
        clipped = seen[0] > 1
        assert bool(clipped.any())
        reached[side] = bool((seen[0].grad[clipped] != 0).any())
    assert reached == {"output": False, "input": True}


PLANS: dict[str, dict[str, Any]] = {
    "dorefa": {"quantizer": "dorefa"},
    "pact": {"quantizer": "pact"},
    "lsq": {"quantizer": "lsq"},
    "bireal": {"quantizer": "bireal", "weights": 1, "activations": 1, "residual": None},
    "sign": {"weights": 1, "activations": 1},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("side", ["output", "input"])
def test_two_steps_with_every_kind_of_quantizer(plan, side):
    teacher = network() if plan in ("dorefa", "pact", "lsq") else signed(network())
    made = objective(FTL(side=side, logits=0.5), teacher, **PLANS[plan])
    before = float_state(made.networks.student)
    before = {name: value.clone() for name, value in before.items()}
    twin = copy.deepcopy(made.networks.teacher.state_dict())
    for losses in steps(made, 2):
        assert list(losses) == ["cross_entropy", "feature_transfer", "logits"]
        assert 0 < losses["feature_transfer"] < 2
    after = float_state(made.networks.student)
    weights = [name for name in before if name.endswith("conv1.weight")]
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    assert all(torch.equal(value, twin[name]) for name, value in made.networks.teacher.state_dict().items())
    assert not any(module.training for module in made.networks.teacher.modules())


def steps(made: Objective, num: int, lr: float = 0.02) -> Iterator[dict[str, float]]:
    optimizer = torch.optim.SGD(made.param_groups(lr), momentum=0.9)
    images, labels = batch()
    for step in range(num):
        made.set_progress(step / num, step)
        losses = made(images, labels)
        losses.total.backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        yield {name: value.item() for name, value in losses.terms.items()}


def test_the_transfer_alone_makes_the_features_alike():
    losses = list(steps(objective(only(), activations=4, weights=4), 30, lr=0.1))
    assert losses[-1]["feature_transfer"] < 0.7 * losses[0]["feature_transfer"]


def test_dead_maps_leave_the_student_alone():
    """A ReLU's output behind a sign quantizer is +1 everywhere: the term is 1 and its gradient exactly zero."""
    made = objective(only(stages=["layer1"]), weights=1, activations=1)
    losses = made(*batch())
    assert losses.total.item() == 1.0
    losses.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.networks.student.parameters())


ARMS: dict[str, dict[str, Any]] = {
    "l2": {"distance": "l2"},
    "l1": {"distance": "l1"},
    "cosine": {"distance": "cosine"},
    "channel": {"axes": "channel"},
    "batch": {"axes": "batch"},
    "blocks": {"taps": "blocks"},
    "one stage": {"stages": "layer2"},
    "rounded": {"distance": "l2", "quantized_teacher": True},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arm):
    values = {}
    for name, options in {"plain": {}, arm: ARMS[arm]}.items():
        torch.manual_seed(0)
        made = objective(FTL(**options), network(blocks=2))
        torch.manual_seed(1)
        values[name] = [losses["feature_transfer"] for losses in steps(made, 2)]
    assert values["plain"] != values[arm]


def test_l2_on_the_rounded_teacher_feature():
    """Zhuang's hint: DoReFa's Q clips the twin's feature to 0..1 and rounds it to 2 bits."""
    made = objective(only(distance="l2", quantized_teacher=True), quantizer="dorefa").eval()
    images, labels = batch()
    students = kept(made.networks.student, {**dict.fromkeys(BEHIND.values(), "output"), "layer3": "output"}, images)
    teachers = kept(made.networks.teacher, dict.fromkeys(STAGES, "output"), images)
    total = 0.0
    for place, stage in zip((*BEHIND.values(), "layer3"), STAGES, strict=True):
        pairs = zip(students[place].flatten().tolist(), teachers[stage].flatten().tolist(), strict=True)
        errors = [(s - round(3 * min(max(t, 0.0), 1.0)) / 3) ** 2 for s, t in pairs]
        total += sum(errors) / len(errors) / 3
    assert made(images, labels).total.item() == pytest.approx(total, rel=1e-4)
    assert [group["name"] for group in made.param_groups(0.1) if group["name"] == "helpers"] == []


def test_the_twin_s_feature_is_not_rounded_by_default():
    made = objective(FTL())
    assert len(made.networks.helpers) == 0
    taps = [tap for tap in FeatureTransfer().taps(made.networks) if tap.network == "teacher"]
    assert taps == [Tap("teacher", stage, "output") for stage in STAGES]
    features = kept(made.networks.teacher, {"layer1": "output"}, batch()[0])["layer1"]
    assert len(features.unique()) > 256


@pytest.mark.parametrize("mirror", [True, False])
def test_a_twin_that_is_trained_along(mirror):
    """D's gradient reaches it or not; either way the student sees it as a constant."""
    recipe = FTL(stages=["layer3"]).with_options(teacher=JointTeacher(mirror=mirror))
    made = objective(recipe)
    losses = made(*batch())
    assert ("teacher_feature_transfer" in losses.terms) == mirror
    transfer = made.terms(*batch())[0]["feature_transfer"]
    made.zero_grad()
    transfer.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.networks.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in made.networks.student.parameters())
    if mirror:
        made.zero_grad()
        made.terms(*batch())[0]["teacher_feature_transfer"].backward()
        assert any(p.grad is not None and p.grad.any() for p in made.networks.teacher.parameters())
        assert all(p.grad is None or not p.grad.any() for p in made.networks.student.parameters())


def test_single_precision_under_autocast():
    made = objective(FTL()).eval()
    images, labels = batch()
    wanted = made(images, labels).terms["feature_transfer"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made(images, labels).terms["feature_transfer"]
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=0.1)


@pytest.mark.filterwarnings(FUNCTION_OBJECTS)
@pytest.mark.parametrize("options", [{}, {"distance": "l2", "quantized_teacher": True}, {"axes": "channel"}])
def test_one_compiled_graph(options):
    torch._dynamo.reset()
    made = objective(FTL(**options)).eval()
    images, labels = batch()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    got, wanted = compiled(images, labels), made(images, labels)
    torch.testing.assert_close(got.terms, wanted.terms)
    got.total.backward()
    gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    wanted.total.backward()
    for name, parameter in made.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_layer_with_a_float_input_is_named():
    """layer2.0.conv1 is kept: nothing quantizes what layer1 gives, unless the shortcut's convolution does."""
    with pytest.warns(UserWarning, match="no quantized layer reads what layer1 give"):
        made = objective(FTL(), keep=("layer2.0.conv1",))
    taps = FeatureTransfer(side="input").taps(made.networks)
    assert taps[:2] == (Tap("student", "layer1", "output"), Tap("student", BEHIND["layer2"], "input"))
    made = objective(FTL(), network(projection=True), keep=("layer2.0.conv1",))
    assert FeatureTransfer().taps(made.networks)[0].module == "layer2.0.shortcut.conv.input_quantizer"


def test_a_value_that_is_changed_in_place_is_another_one():
    class Preactivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage1, self.relu = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), nn.ReLU(inplace=True)
            self.stage2 = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.stage2(self.relu(self.stage1(x)))

    student = quantize(Preactivation(), residual=None)
    assert readers(student, batch()[0], ["stage1", "relu"]) == {"stage1": None, "relu": "stage2"}
    assert student.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_names_and_composition():
    assert FTL().name == "ftl"
    assert FTL(distance="l2", quantized_teacher=True).name == "ftl-l2-quantized"
    assert make("ftl", {"stages": ["layer2"], "weight": 10}) == FTL(10, stages=("layer2",))
    assert [term.name for term in (FTL() + Logits()).terms] == ["cross_entropy", "feature_transfer", "logits"]
    assert len({FTL(), FTL(axes="batch"), Features()}) == 3


def test_bad_words_and_networks():
    for option in ("side", "axes", "distance", "taps"):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'other'"):
            FTL(**{option: "other"})
    with pytest.raises(ValueError, match="has no module 'layer9'"):
        objective(FTL(stages=["layer9"]))
    with pytest.raises(ValueError, match="student and teacher have 3 and 6 blocks"):
        FTL(taps="blocks").objective(quantize(network()), network(blocks=2), batches=[batch()])
    with pytest.raises(ValueError, match="different features at layer1"):
        FTL().objective(
            quantize(network()),
            CifarResNet((1, 1, 1), (8, 8, 16), True, num_classes=3, architecture="x"),
            batches=[batch()],
        )
    with pytest.raises(ValueError, match="quantized_teacher needs a student with quantized activations"):
        objective(FTL(side="input", quantized_teacher=True), activations=32)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"no stages were found in the student; name the modules to compare with"):
        objective(FTL(), plain)
