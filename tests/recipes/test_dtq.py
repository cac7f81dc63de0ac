"""DTQ: the loss recomputed by slow loops, and the pitfalls of its page."""

import copy
import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn

from fewbits.anatomy import Anatomy
from fewbits.convert import quantize
from fewbits.distill import CrossEntropy, Objective
from fewbits.distill.attentive import AttentiveTransfer
from fewbits.models import build
from fewbits.quantizers import Quantizer
from fewbits.recipes import DTQ, Plain
from fewbits.recipes.dtq import AttentiveAlignment, SourceClasses, alignment_points, alignment_taps

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
    reason='timm is not installed: pip install "fewbits[timm]"',
)
SOURCE, TARGET, WIDTH = 7, 3, 6
TAPS = ("body.0", "body.3")


class Net(nn.Module):
    def __init__(self, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, WIDTH, 3, stride=2, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, classes)

    def feature(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.feature(x)))


def batch(num: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, 8, 8), torch.arange(num) % TARGET


def begun(dropout: float = 0.0, **options: object) -> Objective:
    """A source network, and a student that started from it with a new classifier and was moved a little."""
    source, start = Net(SOURCE, dropout), Net(TARGET, dropout)
    start.body.load_state_dict(source.body.state_dict())
    student = quantize(start, 4, 4, quantizer="minmax", residual=None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return DTQ(**options).objective(student, source, batches=[batch()[0]])  # type: ignore[arg-type]


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def slow_head(features: list[list[float]], head: nn.Linear) -> list[list[float]]:
    rows = zip(head.weight.tolist(), head.bias.tolist(), strict=True)
    pairs = list(rows)
    return [[sum(w * f for w, f in zip(ws, row, strict=True)) + b for ws, b in pairs] for row in features]


def slow_loss(
    made: Objective, images: Tensor, labels: list[int], alpha: float, beta: float, temperature: float
) -> float:
    """Eq. 2 with the code's factors, from the networks' own tensors."""
    student, teacher = made.networks.student, made.networks.teacher
    kept: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(tap).register_forward_hook(lambda m, a, out, key=f"{name} {tap}": kept.__setitem__(key, out))
        for name, net in (("student", student), ("teacher", teacher))
        for tap in TAPS
    ]
    with torch.no_grad():
        logits, full = student(images).tolist(), teacher(images).tolist()
        low = slow_head(student.feature(images).tolist(), teacher.head)
    for handle in handles:
        handle.remove()
    n = len(labels)
    total = -sum(math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)) / n
    for row, other in zip(full, low, strict=True):
        p, q = softmax(row, temperature), softmax(other, temperature)
        total += beta * temperature**2 / n * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    for tap, attend in zip(TAPS, made.networks.helpers["alignment"], strict=True):
        s, t = kept[f"student {tap}"], kept[f"teacher {tap}"]
        with torch.no_grad():
            attention = attend(t).tolist()
        for i in range(n):
            for j in range(s.shape[1]):
                norm = sum(
                    (a - b) ** 2 for a, b in zip(s[i, j].flatten().tolist(), t[i, j].flatten().tolist(), strict=True)
                )
                total += alpha * s.shape[1] / 2 / n * attention[i][j] * norm
    squares = sum(value**2 for p in (student.head.weight, student.head.bias) for value in p.flatten().tolist())
    return total + 1e-4 * 0.5 * squares


def test_loss_by_loops():
    made = begun(alpha=0.02, beta=0.7, temperature=3.0).eval()
    images, labels = batch()
    got = made(images, labels).total.item()
    assert got == pytest.approx(slow_loss(made, images, labels.tolist(), 0.02, 0.7, 3.0), rel=1e-4)


def test_defaults_are_the_code_s():
    terms = {term.name: term for term in DTQ().terms}
    assert list(terms) == ["cross_entropy", "alignment", "source_classes", "head_decay"]
    assert (terms["alignment"].weight, terms["source_classes"].weight, terms["head_decay"].weight) == (0.01, 0.5, 1e-4)
    alignment, classes = terms["alignment"], terms["source_classes"]
    assert isinstance(alignment, AttentiveAlignment)
    assert alignment.attention
    assert isinstance(classes, SourceClasses)
    assert classes.temperature == 30.0
    assert DTQ(alpha=0, beta=0).terms[0] == CrossEntropy()
    assert [term.name for term in DTQ(alpha=0, beta=0).terms] == ["cross_entropy", "head_decay"]


def test_the_alignment_s_gradient_is_that_of_the_printed_sum():
    """Numerically, through the student's last aligned layer: its bias shifts a whole channel of the tap."""
    made, images = begun(beta=0.0).eval(), batch()[0]
    taps, helper = made._taps["alignment"], made.networks.helpers["alignment"]

    def loss() -> Tensor:
        values, _ = made.terms(images, batch()[1])
        return values["alignment"]

    bias = made.networks.student.body[3].bias
    (gradient,) = torch.autograd.grad(loss(), [bias])
    for channel in range(WIDTH):
        values = []
        for step in (0.5, -0.5):  # the loss is quadratic in it: any step will do
            with torch.no_grad():
                bias[channel] += step
                values.append(loss().item())
                bias[channel] -= step
        assert gradient[channel].item() == pytest.approx(values[0] - values[1], rel=1e-3, abs=1e-4)
    assert len(taps) == 2 * len(helper) == 4


def test_gradients_reach_the_student_and_the_attention_and_nothing_else():
    made = begun()
    made(*batch()).total.backward()
    networks = made.networks
    assert all(p.grad is not None for p in networks.student.body.parameters())
    attention = networks.helpers["alignment"]
    assert all(p.grad is not None and bool(p.grad.any()) for p in attention.parameters())
    assert all(p.grad is None for p in networks.teacher.parameters())
    assert all(p.grad is None for p in networks.helpers["source_classes"].parameters())
    optimized = {id(p) for group in made.param_groups(0.1) for p in group["params"]}
    assert not optimized & {id(p) for p in networks.helpers["source_classes"].parameters()}
    assert not optimized & {id(p) for p in networks.teacher.parameters()}
    assert {id(p) for p in attention.parameters()} <= optimized


def test_the_attention_looks_at_the_teacher_alone():
    """Pitfall 3."""
    made, seen = begun().eval(), []
    attend = made.networks.helpers["alignment"][0]
    attend.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images, labels = batch()
    made(images, labels)
    torch.testing.assert_close(seen[0], made.networks.teacher.body[0](images))
    assert not seen[0].requires_grad


def test_the_kl_is_on_source_classes():
    """Pitfall 2: it knows nothing of the target classifier, and of the student only the feature."""
    made, (images, labels) = begun(alpha=0.0), batch()
    values, _ = made.terms(images, labels)
    head = made.networks.student.head
    gradients = torch.autograd.grad(
        values["source_classes"], [head.weight, made.networks.student.body[0].weight], allow_unused=True
    )
    assert gradients[0] is None
    assert gradients[1] is not None
    made.eval()
    before = made.terms(images, labels)[0]["source_classes"]
    with torch.no_grad():
        head.weight.normal_()
    torch.testing.assert_close(made.terms(images, labels)[0]["source_classes"], before)


def test_a_student_that_is_the_source_has_no_kl_and_no_distance():
    source = Net(SOURCE)
    student = quantize(source, 8, 8, residual=None)
    made = DTQ().objective(student, source, batches=[batch()[0]]).eval()
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.enabled.fill_(False)
    values, _ = made.terms(batch()[0], batch()[1])
    assert values["alignment"].item() == pytest.approx(0.0, abs=1e-8)
    assert values["source_classes"].item() == pytest.approx(0.0, abs=1e-3)


def test_the_temperature_does_not_scale_the_gradient():
    """T^2: at high temperatures neither the loss nor its gradient depends on T any more."""
    made, (images, labels) = begun(alpha=0.0).eval(), batch()
    with torch.no_grad():
        made.networks.teacher.head.weight.mul_(20.0)  # the classifier of the KL is a copy: a distance to speak of
    norms = []
    for temperature in (100.0, 200.0):
        made._names["source_classes"] = SourceClasses(temperature=temperature)
        value = made.terms(images, labels)[0]["source_classes"]
        (gradient,) = torch.autograd.grad(value, [made.networks.student.body[0].weight])
        norms.append(gradient.norm().item())
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_the_teacher_stays_as_it_is():
    made = begun()
    before = copy.deepcopy(made.networks.teacher.state_dict())
    classes = copy.deepcopy(made.networks.helpers["source_classes"].state_dict())
    optimizer = torch.optim.SGD(made.param_groups(0.1, 0.1), momentum=0.9)
    made.train()
    for _ in range(3):
        made(*batch()).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not made.networks.teacher.training
    assert all(torch.equal(value, before[name]) for name, value in made.networks.teacher.state_dict().items())
    assert all(torch.equal(v, classes[n]) for n, v in made.networks.helpers["source_classes"].state_dict().items())
    assert torch.equal(made.networks.helpers["source_classes"].weight, made.networks.teacher.head.weight)


def test_dropout_is_active_on_the_student_s_kl_path_in_training_only():
    """Pitfall 11."""
    made, (images, labels) = begun(dropout=0.5, alpha=0.0), batch()
    once, again = (made.terms(images, labels)[0]["source_classes"].item() for _ in range(2))
    assert once != again
    made.eval()
    once, again = (made.terms(images, labels)[0]["source_classes"].item() for _ in range(2))
    assert once == again


def test_the_backbone_does_not_decay_and_the_head_does():
    """Pitfall 6; decay as a loss term is SGD's own decay."""
    groups = {group["name"]: group for group in begun().param_groups(0.1, weight_decay=0.5)}
    assert all(group["weight_decay"] == 0.0 for group in groups.values())
    plain = Plain().objective(quantize(Net(TARGET), residual=None), batches=[batch()[0]])
    assert {g["name"]: g["weight_decay"] for g in plain.param_groups(0.1, 0.5)}["student.weights"] == 0.5
    made = begun(alpha=0.0, beta=0.0, head_decay=0.3)
    head = made.networks.student.head
    value = made.terms(*batch())[0]["head_decay"]
    gradients = torch.autograd.grad(0.3 * value, [head.weight, head.bias])
    torch.testing.assert_close(gradients[0], 0.3 * head.weight.detach())
    torch.testing.assert_close(gradients[1], 0.3 * head.bias.detach())


def test_attention_can_be_left_out():
    made = begun(attention=False, alpha=1.0, beta=0.0).eval()
    assert "alignment" not in made.networks.helpers
    images, labels = batch()
    teacher, student = made.networks.teacher, made.networks.student
    slow = 0.0
    with torch.no_grad():
        pairs = [(student.body[:end](images), teacher.body[:end](images)) for end in (1, 4)]
    for s, t in pairs:
        slow += (
            0.5
            * sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
            / len(images)
        )
    assert made.terms(images, labels)[0]["alignment"].item() == pytest.approx(slow, rel=1e-4)


# Where features are aligned


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("resnet20", ("layer1.2.conv2", "layer2.2.conv2", "layer3.2.conv2")),
        ("resnet18", ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")),
        ("vgg-small", ("stage1.conv2", "stage2.conv2", "stage3.conv2")),
    ],
)
def test_points_of_our_networks(name: str, points: tuple[str, ...]):
    network = build(name, num_classes=3)
    assert alignment_points(network, Anatomy.of(network)) == points


@needs_timm
@pytest.mark.parametrize(
    ("name", "kind", "shapes"),
    [
        ("timm:resnet50", nn.Conv2d, [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]),
        ("timm:mobilenetv2_100", nn.BatchNorm2d, [(32, 8, 8), (64, 4, 4), (96, 4, 4), (320, 2, 2)]),
    ],
)
def test_points_of_the_paper_s_networks(name: str, kind: type, shapes: list[tuple[int, ...]]):
    """The page's table, at 64 pixels instead of 224."""
    network = build(name, num_classes=3).eval()
    points, found = alignment_points(network, Anatomy.of(network)), []
    for point in points:
        assert isinstance(network.get_submodule(point), kind)
        network.get_submodule(point).register_forward_hook(lambda m, args, out: found.append(tuple(out.shape[1:])))
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
    assert found == shapes
    if name == "timm:resnet50":
        assert points == ("layer1.2.conv3", "layer2.3.conv3", "layer3.5.conv3", "layer4.2.conv3")


def test_torchvision_s_mobilenet_has_its_own_names():
    block = nn.ModuleDict(
        {"conv": nn.Sequential(nn.Conv2d(1, 1, 1), nn.Identity(), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))}
    )
    network = nn.Module()
    network.features = nn.ModuleList(copy.deepcopy(block) for _ in range(19))
    network.classifier = nn.Linear(1, 2)
    points = alignment_points(network, Anatomy.of(network))
    assert points == tuple(f"features.{index}.conv.3" for index in (5, 9, 13, 17))


def test_no_activation_quantizer_stands_before_a_tap():
    """A bottleneck's batch norm enters an addition, where an 8-bit quantizer hangs on it; the tap is before that."""

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.relu, self.pool, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.pool(self.relu(x + self.bn(self.conv(x)))).flatten(1))

    source, images = Bottleneck(), torch.randn(4, 3, 16, 16)
    student = quantize(source, 4, 4, quantizer="minmax")
    made = DTQ(beta=0, attention=False, taps=["bn"]).objective(student, source, batches=[images]).eval()
    (own, other) = alignment_taps(made.networks, ("bn",))
    assert (own.module, own.side) == ("bn.output_stream", "input")
    assert (other.module, other.side) == ("bn", "output")
    student(images)
    assert len(made._hooks.collect()[own].unique()) > 256


def test_taps_by_name():
    made = begun(taps=["body.4"], beta=0)
    assert {tap.module for tap in made._taps["alignment"]} == {"body.4"}
    (attend,) = made.networks.helpers["alignment"]
    assert isinstance(attend, AttentiveTransfer)
    assert attend.hidden.weight.shape == (4, 16)


# What does not fit


def test_taps_that_are_no_maps():
    with pytest.raises(ValueError, match=r"taps must name modules that give maps, N x C x H x W; head gives \(2, 7\)"):
        begun(taps=["head"])
    with pytest.raises(ValueError, match="has no module 'nowhere' to tap"):
        begun(taps=["nowhere"])


def test_a_network_without_convolutions():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Sequential has no convolution to align; name modules that give maps in taps"):
        alignment_points(network, Anatomy.of(network))


def test_a_feature_of_another_width():
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__(SOURCE)
            self.head = nn.Linear(2 * WIDTH, SOURCE)

        def feature(self, x: Tensor) -> Tensor:
            return super().feature(x).repeat(1, 2)

    with pytest.raises(ValueError, match=r"the source classifier takes 12 features, the student has 6; .* or beta 0"):
        DTQ(alpha=0).objective(quantize(Net(TARGET), residual=None), Wide(), batches=[batch()[0]])
