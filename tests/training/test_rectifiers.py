"""Which ReLUs are left to the quantizer behind them, which are not, and that no bit of a step changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import fewbits as fb
from fewbits.quantizers import native
from fewbits.quantizers.again import QuantizingAgain
from fewbits.recipes import RECIPES
from fewbits.training import Settings, rectifiers, step
from fewbits.training.rectifiers import find, rectified_by_quantizers
from fewbits.training.setup import make_accelerator
from fewbits.training.step import Stepper

NETWORKS = [
    ("resnet20", 8, 19),
    ("resnet20", None, 9),  # a shortcut reads the other ten
    ("timm:resnet18", 8, 17),
    ("timm:resnet18", None, 8),
    ("timm:mobilenetv2_100", 8, 35),
    ("timm:mobilenetv2_100", None, 34),  # what the last layer gives goes into pooling
    ("vgg-small", 8, 6),
]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file's networks count as known code."""
    monkeypatch.setattr(rectifiers, "KNOWN", rectifiers.KNOWN | {__name__.partition(".")[0]})


def calibrated(net: nn.Module, images: Tensor, residual: int | None = None, bits: int = 4) -> nn.Module:
    student = fb.quantize(net, bits, bits, residual=residual)
    fb.calibrate(student, [images])
    return student.train()


def passed(student: nn.Module, images: Tensor, armed: bool) -> list[Tensor]:
    """Values, gradients and buffers of one step of a copy."""
    student = copy.deepcopy(student)
    with rectified_by_quantizers(find(student) if armed else ()), QuantizingAgain():
        y = student(images)
        y.square().mean().backward()
    return [y.detach(), *(p.grad for p in student.parameters() if p.grad is not None), *student.buffers()]


def assert_same_bits(one: list[Tensor], two: list[Tensor]) -> None:
    for given, wanted in zip(one, two, strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize(("name", "residual", "count"), NETWORKS)
def test_networks(name: str, residual: int | None, count: int):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    student = calibrated(fb.models.build(name, num_classes=5, image_size=32), images, residual)
    before = copy.deepcopy(student.state_dict())
    assert len(find(student)) == count
    assert_same_bits([*student.state_dict().values()], [*before.values()])
    assert_same_bits(passed(student, images, True), passed(student, images, False))


class Net(nn.Module):
    """A norm, a ReLU and a layer, with room for one more reader of any value."""

    def __init__(self, inplace: bool = False, more: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.inner = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1))
        self.head = nn.Conv2d(4, 2, 1)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        normed = self.norm(x)
        rectified = self.relu(normed)
        y = self.inner(rectified)
        return self.head(y if self.more is None else self.more(y, normed, rectified))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin()


@pytest.mark.parametrize(
    ("more", "inplace", "count"),
    [
        (None, False, 1),
        (None, True, 1),
        (lambda y, normed, rectified: y + normed, False, 1),  # reads what the ReLU took
        (lambda y, normed, rectified: y + normed, True, 0),  # and would read what it became
        (lambda y, normed, rectified: y + rectified, False, 0),
        (lambda y, normed, rectified: torch.relu(y), False, 1),
    ],
)
@pytest.mark.usefixtures("known")
def test_who_else_reads(more: Any, inplace: bool, count: int):
    torch.manual_seed(0)
    student = calibrated(Net(inplace, more), IMAGES)
    assert len(find(student)) == count
    assert_same_bits(passed(student, IMAGES, True), passed(student, IMAGES, False))


@pytest.mark.parametrize("residual", [8, None])
def test_a_closed_gate_behind_a_relu_in_place(residual: int | None):
    """Found by a reviewer: the quantizer rectified in place what autograd had kept for it."""
    torch.manual_seed(0)
    student = calibrated(fb.models.build("timm:resnet18", num_classes=5, image_size=32), IMAGES, residual)
    for pair in find(student)[::2]:
        pair.quantizer.enabled.fill_(False)
    assert_same_bits(passed(student, IMAGES, True), passed(student, IMAGES, False))


class Renamed(Net):
    """Reads what a ReLU in place was given by another name for the same memory."""

    def __init__(self, rename: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inplace=True)
        self.rename = rename

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.stem(x))
        return self.head(self.inner(self.relu(self.rename(normed))) + normed)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    "rename",
    [
        nn.Hardtanh(-9, 9, inplace=True),
        nn.Dropout2d(0.0),
        nn.Identity(),
        nn.ReLU(inplace=True),
        lambda x: x.view_as(x),
        lambda x: x[:],
    ],
)
def test_a_second_name_for_the_same_memory(rename: Any):
    student = calibrated(Renamed(rename), IMAGES.clone())
    assert not any(pair.relu is student.relu for pair in find(student))


def test_an_input_in_place_is_the_caller_s():
    student = calibrated(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), IMAGES.clone())
    assert find(student) == ()


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.inner(self.relu(self.norm(self.stem(x))))))


class Unclear(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(F.relu(self.stem(x))))


class Optional(Net):
    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        rectified = self.relu(self.norm(self.stem(x)))
        y = self.inner(rectified)
        return self.head(y + (rectified if shortcut is None else shortcut))


class Sliced(Net):
    """A quantizer would keep all channels for the sake of two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.relu(self.norm(self.stem(x))[:, :2])))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("kind", [Twice, Unclear, Functional, Optional, Sliced])
def test_what_is_left_as_it_is(kind: type[Net]):
    assert find(calibrated(kind(), IMAGES)) == ()


class Keeping(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.relu(self.norm(self.stem(x)))
        return self.head(self.inner(self.feature))


@pytest.mark.parametrize("where", ["network", "child", "patched"])
def test_code_that_a_trace_may_not_show_is_not_looked_into(where: str):
    """Found by a reviewer: attributes, flags and branches on types, which a trace does not show."""
    net: nn.Module = Keeping()
    if where == "child":
        net = nn.Sequential(Keeping())
    if where == "patched":
        net = fb.models.build("resnet20", num_classes=5)
        net.layer1[0].forward = net.layer1[0].forward
    student = calibrated(net, IMAGES)
    assert find(student) == ()
    assert not hasattr(student, "feature") or isinstance(student.feature, Tensor)


@pytest.mark.usefixtures("known")
def test_what_is_shared_is_left_alone():
    student = calibrated(Net(), IMAGES)
    student.another_name = student.relu  # inside a module that is not looked into, say
    assert find(student) == ()
    student = calibrated(Net(), IMAGES)
    student.another_name = student.inner[1].input_quantizer
    assert find(student) == ()


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("method", ["pact", "dorefa", "ewgs"])
def test_other_quantizers_are_left_alone(method: str):
    student = fb.quantize(Net(), 4, 4, quantizer=method, ends=32, residual=None)
    assert find(student) == ()


@pytest.mark.usefixtures("known")
def test_nobody_sees_what_the_relu_did_not_do():
    """A hook anywhere on the value's way keeps the ReLU as it is, for as long as it hangs there."""
    torch.manual_seed(0)
    student = calibrated(Net(), IMAGES)
    (pair,) = find(student)
    layer = student.inner[1]
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, *result: Any) -> None:
        seen.extend(value for value in (*args, *result) if isinstance(value, Tensor))

    with rectified_by_quantizers([pair]):
        assert student.relu(-torch.ones(1)) == -1
    places = (student.relu, student.inner, student.inner[0], layer)
    hung = [place.register_forward_hook for place in places] + [
        *(place.register_forward_pre_hook for place in (student.inner, student.inner[0], layer)),
        *(layer.input_quantizer.register_forward_hook, layer.input_quantizer.register_forward_pre_hook),
        *(place.register_full_backward_hook for place in (*places, layer.input_quantizer)),
        *(student.relu.register_full_backward_pre_hook, register_module_full_backward_hook),
        register_module_forward_hook,
    ]
    for register in hung:
        handle = register(hook)
        with rectified_by_quantizers([pair]):
            assert student.relu.forward(-torch.ones(1)) == 0
        handle.remove()
        with rectified_by_quantizers([pair]):
            assert student.relu.forward(-torch.ones(1)) == -1
    student.inner[1].input_quantizer = copy.deepcopy(layer.input_quantizer)  # somebody else's now
    with rectified_by_quantizers([pair]):
        assert student.relu(-torch.ones(1)) == 0


@pytest.mark.usefixtures("known")
def test_a_tap_on_what_a_relu_in_place_took():
    """It keeps the tensor, whose values the ReLU is going to change. Found by a reviewer."""
    for inplace in (False, True):
        student = calibrated(Net(inplace), IMAGES)
        (pair,) = find(student)
        handle = student.norm.register_forward_hook(lambda *_: None)
        with rectified_by_quantizers([pair]):
            assert float(student.relu(-torch.ones(1))) == (0 if inplace else -1)
        handle.remove()


def test_a_hook_before_the_stream_s_keeps_the_relu():
    student = calibrated(fb.models.build("resnet20", num_classes=5), torch.randn(2, 3, 32, 32), residual=8)
    relu = student.get_submodule("layer1.0.relu2")
    pairs = [pair for pair in find(student) if pair.relu is relu]
    for prepend, wanted in ((False, -1), (True, 0)):
        handle = relu.register_forward_hook(lambda *_: None, prepend=prepend)
        with rectified_by_quantizers(pairs):
            assert float(relu.forward(-torch.ones(()))) == wanted
        handle.remove()


@pytest.mark.usefixtures("known")
def test_modules_are_left_as_they_were():
    student = calibrated(Net(), IMAGES)
    pairs = find(student)
    with pytest.raises(ZeroDivisionError), rectified_by_quantizers(pairs):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in student.modules())
    assert_same_bits(passed(student, IMAGES, False), passed(student, IMAGES, False))
    student.relu.forward = lambda x: x.abs()  # somebody's own
    with rectified_by_quantizers(pairs):
        assert float(student.relu(-torch.ones(()))) == 1


@pytest.mark.skipif(not native.is_available(), reason=native.reason() or "there is one")
@pytest.mark.usefixtures("known")
def test_a_backward_pass_outside_is_an_error():
    student = calibrated(Net(), IMAGES)
    with rectified_by_quantizers(find(student)), QuantizingAgain():
        loss = student(IMAGES).square().mean()
    with pytest.raises(RuntimeError, match="changed between a forward pass and its backward pass"):
        loss.backward()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"checkpoint_blocks": True, "accumulate": 2}])
def test_no_bit_of_a_step_changes(recipe: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    found: list[list[Tensor]] = []
    for armed in (True, False):
        torch.manual_seed(0)
        teacher = fb.models.build("resnet20", num_classes=10)
        made = fb.recipes.make(recipe)
        bits = 1 if recipe == "blockwise" else 4
        student = teacher if recipe == "float" else fb.quantize(teacher, bits, bits, residual=None if bits == 1 else 8)
        with_teacher = copy.deepcopy(teacher) if made.teacher.needs_teacher else None
        objective = made.objective(student, with_teacher, batches=[images])
        asked = Settings(batch_size=4, device="cpu", lr=0.01, **settings)
        with monkeypatch.context() as patch:
            if not armed:
                patch.setattr(step, "find", lambda network: ())
            stepper = Stepper(objective, asked, make_accelerator(asked))
        for _ in range(2):
            losses, taken = stepper(images, labels, 1.0, "a test")
            assert taken
        stepper.close()
        objective.close()
        found.append([*losses.values(), *student.state_dict().values()])
    assert_same_bits(*found)
