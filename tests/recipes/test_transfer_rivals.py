"""L2-SP and DELTA, recomputed by slow loops."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewbits.convert import quantize
from fewbits.distill import Objective
from fewbits.quantizers import Quantizer
from fewbits.recipes import DELTA, L2SP, Recipe
from fewbits.recipes.transfer_rivals import channel_weights

SOURCE, TARGET = 7, 3


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 5, 3, padding=1, stride=2), nn.BatchNorm2d(5), nn.ReLU()
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.head(self.relu2(self.bn2(self.conv2(x))).mean((2, 3)))


def batch(num: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, 8, 8), torch.arange(num) % TARGET


def begun(recipe: Recipe, images: Tensor | None = None) -> Objective:
    """Source and student are a little apart, in every weight."""
    source, start = Net(SOURCE), Net(TARGET)
    start.load_state_dict({n: v for n, v in source.state_dict().items() if not n.startswith("head")}, strict=False)
    student = quantize(start, 4, 4, quantizer="minmax", residual=None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return recipe.objective(student, source, batches=[batch()[0] if images is None else images])


def squares(tensor: Tensor) -> float:
    return sum(value**2 for value in tensor.detach().flatten().tolist())


def test_l2_sp_by_loops():
    made = begun(L2SP(0.3, 0.2))
    values, _ = made.terms(*batch())
    student, source = made.networks.student, made.networks.teacher
    distance = 0.0
    for layer in ("conv1", "bn1", "conv2", "bn2"):
        for kind in ("weight", "bias"):
            own, other = (getattr(net.get_submodule(layer), kind) for net in (student, source))
            distance += 0.5 * squares(own.detach() - other.detach())
    assert values["source_distance"].item() == pytest.approx(distance, rel=1e-5)
    decay = 0.5 * (squares(student.head.weight) + squares(student.head.bias))
    assert values["head_decay"].item() == pytest.approx(decay, rel=1e-5)
    whole = made(*batch()).total.item()
    assert whole > 0.3 * distance + 0.2 * decay  # and the cross-entropy


def test_l2_sp_s_gradient_and_whom_it_leaves_alone():
    made = begun(L2SP())
    student, source = made.networks.student, made.networks.teacher
    values, _ = made.terms(*batch())
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(values["source_distance"], list(parameters.values()), allow_unused=True)
    for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
        if name.startswith("head") or "quantizer" in name:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, weight.detach() - source.get_parameter(name).detach())
    assert all(p.grad is None for p in source.parameters())


def test_nothing_else_decays():
    for recipe in (L2SP(), DELTA()):
        groups = begun(recipe).param_groups(0.1, weight_decay=0.5)
        assert all(group["weight_decay"] == 0.0 for group in groups), recipe.name


def test_l2_sp_holds_the_weights_without_owning_them():
    made = begun(L2SP())
    assert not list(made.networks.helpers.parameters())
    assert not made.networks.helpers.state_dict()
    ids = [id(p) for group in made.param_groups(0.1) for p in group["params"]]
    assert len(ids) == len(set(ids))


def test_l2_sp_needs_the_network_that_the_student_came_from():
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, TARGET)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).mean((2, 3)))

    student = quantize(Other(), residual=None)
    with pytest.raises(ValueError, match=r"has no conv1\.weight, conv1\.bias, bn1\.weight of the teacher's shape"):
        L2SP().objective(student, Net(SOURCE), batches=[batch()[0]])


def test_delta_by_loops():
    images, labels = batch()
    made = begun(DELTA(), images).eval()
    networks = made.networks
    kept: dict[str, Tensor] = {}
    for name, net in (("student", networks.student), ("teacher", networks.teacher)):
        for layer in ("conv1", "conv2"):
            net.get_submodule(layer).register_forward_hook(
                lambda m, a, out, key=f"{name} {layer}": kept.__setitem__(key, out.detach())
            )
    got = made.terms(images, labels)[0]["delta"].item()
    slow = 0.0
    for index, layer in enumerate(("conv1", "conv2")):
        s, t = kept[f"student {layer}"], kept[f"teacher {layer}"]
        weights = networks.helpers["delta"].of(index).tolist()
        n, c, h, w = s.shape
        for i in range(n):  # not divided by the batch
            for j in range(c):
                slow += 0.5 * c * weights[j] / (h * w) * squares(s[i, j] - t[i, j])
    assert got == pytest.approx(slow, rel=1e-4)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def test_delta_s_weights_by_loops():
    """Each channel's score is how much the source network's own loss grows without it."""
    images = batch(8)[0]
    made = begun(DELTA(), images)
    teacher = made.networks.teacher.eval()
    with torch.no_grad():
        whole = [softmax(row) for row in teacher(images).tolist()]
        for index, (layer, norm) in enumerate((("conv1", "bn1"), ("conv2", "bn2"))):
            scores = []
            for channel in range(len(getattr(teacher, norm).weight)):
                conv = teacher.get_submodule(layer)
                weight, bias = conv.weight[channel].clone(), conv.bias[channel].clone()
                conv.weight[channel], conv.bias[channel] = 0.0, 0.0
                without = [softmax(row) for row in teacher(images).tolist()]
                conv.weight[channel], conv.bias[channel] = weight, bias
                score = 0.0
                for p_row, q_row in zip(whole, without, strict=True):
                    score += sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True)) / len(whole)
                scores.append(score)
            mean = sum(scores) / len(scores)
            deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
            slow = softmax([(score - mean) / deviation / 5 for score in scores])
            found = made.networks.helpers["delta"].of(index)
            torch.testing.assert_close(found, torch.tensor(slow), rtol=1e-3, atol=1e-5)
            assert len({round(value, 6) for value in slow}) > 1


def test_the_most_important_channel_weighs_most():
    weights = channel_weights(torch.tensor([0.0, 0.1, 5.0]))
    assert weights.argmax() == 2
    assert weights.sum().item() == pytest.approx(1.0)
    assert channel_weights(torch.zeros(4)).tolist() == [0.25] * 4
    assert channel_weights(torch.tensor([3.0])).tolist() == [1.0]


def test_uniform_weights_can_be_asked_for():
    helper = begun(DELTA(measure=False)).networks.helpers["delta"]
    assert helper.of(0).tolist() == [0.25] * 4
    assert helper.of(1).tolist() == pytest.approx([0.2] * 5)


def test_fixed_weights_are_fixed():
    made = begun(DELTA())
    before = {name: value.clone() for name, value in made.networks.helpers.state_dict().items()}
    assert set(before) == {"delta.tap0", "delta.tap1"}
    optimizer = torch.optim.SGD(made.param_groups(0.1), momentum=0.9)
    for _ in range(2):
        made(*batch()).total.backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in made.networks.helpers.state_dict().items())


def test_measuring_leaves_the_teacher_as_it_was():
    source = Net(SOURCE)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    student = quantize(Net(TARGET), residual=None)
    made = DELTA().objective(student, source, batches=[batch()[0]])
    assert all(torch.equal(value, before[name]) for name, value in made.networks.teacher.state_dict().items())
    assert not made.networks.teacher.conv1._forward_pre_hooks
    made.close()
    assert not any(m._forward_hooks for m in made.networks.teacher.modules())
    assert not any(m._forward_hooks for m in student.modules() if not isinstance(m, Quantizer))
