"""QFD: the teacher's head consumes the quantized feature, and the student is drawn to it; recomputed by slow loops."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbits.convert import quantize
from fewbits.distill import Networks, Objective
from fewbits.quantizers.feature import FeatureQuantizer
from fewbits.recipes import QFD, Features, Frozen, QuantizedFeature
from fewbits.recipes.qfd import QUANTIZER, QuantizeFeature

WIDTH, CLASSES = 6, 3


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 20)


def network(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


def batch(num: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, 8, 8), torch.arange(num) % CLASSES


def begun(recipe: Any = None, phase: int = 0, width: int = WIDTH, **options: Any) -> tuple[Objective, nn.Module]:
    """The objective of a phase, those before it begun and not trained; and the caller's teacher."""
    recipe = recipe or QFD(**options)
    teacher = network(width)
    student, images = quantize(teacher, 4, 4), batch()[0]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made = None
    for index in range(phase + 1):
        held = made.networks if made else None
        made = recipe.objective(student, teacher, batches=[images], phase=index, networks=held)
    assert made is not None
    return made, teacher


def quantizer_of(networks: Networks) -> FeatureQuantizer:
    quantizer = networks.teacher[-1].get_submodule(QUANTIZER)
    assert isinstance(quantizer, FeatureQuantizer)
    return quantizer


def body(model: nn.Module, images: Tensor) -> Tensor:
    return nn.Sequential(*list(model)[:-1])(images)


def slow_quantized(features: list[list[float]], quantizer: FeatureQuantizer) -> list[list[float]]:
    """s * round((2^b - 1) clip((f - l) / (u - l), 0, 1)) / (2^b - 1)."""
    low, high, scale = quantizer.lower.item(), quantizer.upper.item(), quantizer.output_scale.item()
    steps = 2**quantizer.bits - 1
    return [
        [scale * round(steps * min(max((f - low) / (high - low), 0.0), 1.0)) / steps for f in row] for row in features
    ]


def slow_cross_entropy(logits: list[list[float]], labels: list[int]) -> float:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[label]
    return total / len(logits)


def slow_head(features: list[list[float]], head: nn.Linear) -> list[list[float]]:
    weight, bias = head.weight.tolist(), head.bias.tolist()
    return [
        [sum(w * f for w, f in zip(w_row, row, strict=True)) + b for w_row, b in zip(weight, bias, strict=True)]
        for row in features
    ]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_teacher_s_loss_goes_through_its_quantized_feature(bits: int):
    made, teacher = begun(bits=bits)
    made.eval()
    images, labels = batch()
    losses = made(images, labels)
    edited, quantizer = made.networks.teacher, quantizer_of(made.networks)
    features = body(edited, images).tolist()
    quantized = slow_quantized(features, quantizer)
    assert len({value for row in quantized for value in row}) <= 2**bits
    logits = slow_head(quantized, edited[-1])
    torch.testing.assert_close(losses.logits, torch.tensor(logits))
    assert losses.total.item() == pytest.approx(slow_cross_entropy(logits, labels.tolist()), rel=1e-5)
    assert list(losses.terms) == ["teacher_cross_entropy"]
    assert not torch.equal(losses.logits, teacher.eval()(images))  # the float head's logits are another thing
    assert made.taught is edited


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("retrain", [True, False])
def test_the_student_s_loss(bits: int, reduction: Any, retrain: bool):
    made, _ = begun(phase=1 if retrain else 0, bits=bits, reduction=reduction, weight=0.7, retrain=retrain)
    made.eval()
    images, labels = batch()
    losses = made(images, labels)
    student, teacher = made.networks.student, made.networks.teacher
    with torch.no_grad():
        f_student = body(student, images)
        f_teacher = slow_quantized(body(teacher, images).tolist(), quantizer_of(made.networks))
        logits = student(images).tolist()
    assert len(f_student.unique()) == f_student.numel()  # the student's feature passes no quantizer of its own
    error = 0.0
    for row, targets in zip(f_student.tolist(), f_teacher, strict=True):
        error += sum((s - t) ** 2 for s, t in zip(row, targets, strict=True))
    error /= len(images) * (WIDTH if reduction == "mean" else 1)
    entropy = slow_cross_entropy(logits, labels.tolist())
    assert losses.terms["quantized_features"].item() == pytest.approx(error, rel=1e-4)
    assert losses.terms["cross_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert losses.total.item() == pytest.approx(entropy + 0.7 * error, rel=1e-4)


def test_sum_is_mean_times_the_dimension():
    images, labels = batch()
    values = []
    for reduction in ("sum", "mean"):
        torch.manual_seed(1)
        made, _ = begun(phase=1, reduction=reduction)
        values.append(made.eval()(images, labels).terms["quantized_features"].item())
    assert values[0] == pytest.approx(WIDTH * values[1], rel=1e-5)


@pytest.mark.parametrize("weight", [0.5, 0.0, 3.0])
def test_the_gradient_at_the_head_s_input(weight: float):
    """dL/df_s = dCE/df_s + lambda * 2 (f_s - f_Q) / N: through the head, and straight at it."""
    made, _ = begun(phase=1, bits=2, weight=weight)
    made.eval()
    student, teacher, (images, labels) = made.networks.student, made.networks.teacher, batch()
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    student[-1].register_forward_pre_hook(keep)
    made(images, labels).total.backward()
    feature = seen[0].detach().requires_grad_()
    F.cross_entropy(student[-1](feature), labels).backward()
    with torch.no_grad():
        target = torch.tensor(slow_quantized(body(teacher, images).tolist(), quantizer_of(made.networks)))
    wanted = feature.grad + weight * 2 * (feature.detach() - target) / len(images)
    torch.testing.assert_close(seen[0].grad, wanted)
    assert bool(student[0].weight.grad.any())
    assert all(p.grad is None for p in teacher.parameters())


def train(made: Objective, lr: float = 0.1, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(made.param_groups(lr), momentum=0.9)
    for _ in range(steps):
        made(*batch()).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_teacher_moves_in_its_phase_and_stands_in_the_student_s():
    recipe, teacher = QFD(bits=2), network()
    untouched = copy.deepcopy(teacher)
    student, images = quantize(teacher, 4, 4), batch()[0]
    first = recipe.objective(student, teacher, batches=[images])
    edited = first.networks.teacher
    before = copy.deepcopy(edited.state_dict())
    student_before = copy.deepcopy(student.state_dict())
    train(first)
    for key, parameter in edited.named_parameters():
        assert not torch.equal(parameter, before[key]), key
    assert not torch.equal(edited[1].running_mean, before["1.running_mean"])  # its batch norm trains along
    assert all(torch.equal(value, student_before[key]) for key, value in student.state_dict().items())

    second = recipe.objective(student, teacher, batches=[images], phase=1, networks=first.networks)
    assert second.networks.teacher is edited
    frozen = copy.deepcopy(edited.state_dict())
    train(second)
    assert all(torch.equal(value, frozen[key]) for key, value in edited.state_dict().items())
    assert not any(module.training for module in edited.modules())
    for key, parameter in student.named_parameters():
        assert not torch.equal(parameter, student_before[key]), key

    # The caller's own object: no quantizer, no hook, no number changed.
    assert edited is not teacher
    assert [name for name, _ in teacher.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_teacher_frozen_by_hand_is_retrained_all_the_same():
    """Found: only the three scalars of its quantizer would have trained, which is the control and not QFD."""
    recipe, teacher = QFD(bits=2), network()
    student = quantize(teacher, 4, 4)
    teacher.requires_grad_(False)
    made = recipe.objective(student, teacher, batches=[batch()])
    before = made.networks.teacher[0].weight.clone()
    train(made)
    assert not torch.equal(made.networks.teacher[0].weight, before)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_rates():
    """A fifth of the run's rate for the teacher, and a hundredth of that for the range and scale of its feature."""
    made, _ = begun(bits=2)
    groups = {group["name"]: group for group in made.param_groups(0.1, weight_decay=1e-4)}
    assert groups["teacher.weights"]["lr"] == pytest.approx(0.02)
    assert groups["teacher.quantizers"]["lr"] == pytest.approx(0.02 * 1e-2)
    assert groups["teacher.quantizers"]["weight_decay"] == 0.0
    quantizer = quantizer_of(made.networks)
    scalars = {id(quantizer.lower), id(quantizer.upper), id(quantizer.output_scale)}
    assert {id(p) for p in groups["teacher.quantizers"]["params"]} == scalars
    assert QFD(teacher_lr=0.5).phases()[0].trains[0].lr == 0.5


def test_the_feature_s_quantizer_starts_from_the_float_feature():
    """Of the same size, whatever that is; shape and order are those of x_q, an affine map of the feature."""
    for size in (1.0, 100.0):
        teacher, images = network(), batch()[0]
        nn.init.constant_(teacher[1].weight, size)
        made = QFD(bits=8).objective(quantize(teacher), teacher, batches=[images])
        quantizer = quantizer_of(made.networks)
        assert bool(quantizer.calibrated)
        features = body(teacher.eval(), images)
        quantized = quantizer(features)
        assert quantized.abs().mean().item() == pytest.approx(features.abs().mean().item(), rel=1e-3)
        assert torch.corrcoef(torch.stack([quantized.flatten(), features.flatten()]))[0, 1].item() > 0.99


@pytest.mark.parametrize(("width", "bits"), [(6, 4), (255, 4), (256, 1)])
def test_bits_by_width(width: int, bits: int):
    made, _ = begun(width=width)
    assert quantizer_of(made.networks).bits == bits


def test_one_bit_is_zero_or_the_scale():
    made, _ = begun(bits=1)
    quantizer = quantizer_of(made.networks)
    values = quantizer(body(made.networks.teacher.eval(), batch()[0])).unique()
    assert values.tolist() == pytest.approx([0.0, quantizer.output_scale.item()])


def test_phases_and_names():
    phases = QFD(bits=2, share=0.3).phases()
    assert [phase.name for phase in phases] == ["teacher", "student"]
    assert [phase.share for phase in phases] == pytest.approx([0.3, 0.7])
    assert QFD().teacher == QuantizedFeature(None, 0.2, 0.2)
    rounded = QFD(bits=2, retrain=False)
    assert rounded.name == "qfd-rounded"
    assert len(rounded.phases()) == 1
    assert rounded.phases()[0].edits == (QuantizeFeature(2),)


def test_rounded_leaves_the_teacher_s_weights_and_object_alone():
    made, teacher = begun(bits=2, retrain=False)
    before = copy.deepcopy(made.networks.teacher.state_dict())
    train(made)
    assert all(torch.equal(value, before[key]) for key, value in made.networks.teacher.state_dict().items())
    assert made.networks.teacher is not teacher
    assert QUANTIZER not in dict(teacher[-1].named_children())


def test_32_bits_are_the_features_recipe():
    assert QFD(0.3, bits=32, reduction="mean") == Features(0.3, "mean")


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_bits_out_of_range(bits: int):
    with pytest.raises(ValueError, match=f"bits must be a whole number from 1 to 8 or 32 or None, got {bits}"):
        QFD(bits=bits)


def test_other_bad_arguments():
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"share must be a number between 0 and 1, got {share}; it is the teacher"):
            QFD(share=share)
    with pytest.raises(TypeError, match="bits must be a whole number"):
        QFD(bits="four")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, got 'max'"):
        begun(phase=1, reduction="max")


def test_features_of_different_width():
    with pytest.raises(ValueError, match=r"different features: \(6,\) and \(8,\) per image"):
        QFD(bits=2, retrain=False).objective(quantize(network()), network(8), batches=[batch()])


def test_a_teacher_whose_feature_is_quantized_already():
    """Found: the feature would have been quantized twice over."""
    made, _ = begun(bits=2)
    with pytest.raises(ValueError, match="feature is quantized already; pass the float network"):
        QFD(bits=2).objective(quantize(network()), made.networks.teacher, batches=[batch()])


def test_a_convolution_as_head():
    """N x D x 1 x 1 enters it; the losses are those of the flat feature."""

    def fully_convolutional() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Sequential(nn.Conv2d(WIDTH, CLASSES, 1), nn.Flatten()),
        )

    teacher, recipe = fully_convolutional(), QFD(bits=2)
    student = quantize(teacher, 4, 4)
    first = recipe.objective(student, teacher, batches=[batch()])
    second = recipe.objective(student, teacher, batches=[batch()], phase=1, networks=first.networks)
    second(*batch()).total.backward()
    assert bool(student[0].weight.grad.any())


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("retrain", [True, False])
def test_the_feature_before_the_pooling(bits: int, reduction: Any, retrain: bool):
    """The teacher's head consumes the pooled quantized map; the student's map is compared before the pooling."""
    made, teacher = begun(phase=1 if retrain else 0, bits=bits, reduction=reduction, retrain=retrain, pooled=False)
    made.eval()
    edited, student, (images, labels) = made.networks.teacher, made.networks.student, batch()
    quantizer = edited[2].get_submodule(QUANTIZER)  # on the ReLU's output
    assert isinstance(quantizer, FeatureQuantizer)
    assert quantizer.bits == bits
    assert QUANTIZER not in dict(edited[-1].named_children())
    with torch.no_grad():
        f_student, f_teacher = student[:3](images), nn.Sequential(*list(teacher.eval())[:3])(images)
        height, width = f_student.shape[2:]
        target = torch.tensor(slow_quantized(f_teacher.flatten(1).tolist(), quantizer)).view_as(f_teacher)
        torch.testing.assert_close(edited(images), edited[-1](target.mean((2, 3))))
    losses = made(images, labels)
    error = 0.0
    for row, targets in zip(f_student.flatten(1).tolist(), target.flatten(1).tolist(), strict=True):
        error += sum((s - t) ** 2 for s, t in zip(row, targets, strict=True))
    error /= len(images) * (WIDTH * height * width if reduction == "mean" else 1)
    assert losses.terms["quantized_features"].item() == pytest.approx(error, rel=1e-4)
    losses.total.backward()
    assert bool(student[0].weight.grad.any())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    with pytest.raises(ValueError, match="feature is quantized already"):
        QFD(pooled=False).objective(quantize(network()), edited, batches=[batch()])


@pytest.mark.parametrize("pooled", [True, False])
def test_float_features_before_and_behind_the_pooling(pooled: bool):
    assert QFD(bits=32, pooled=pooled) == Features(pooled=pooled)
    teacher = network()
    student, (images, labels) = quantize(teacher, 4, 4), batch()
    made = Features(reduction="mean", pooled=pooled).objective(student, teacher, batches=[images]).eval()
    end = 5 if pooled else 3
    with torch.no_grad():
        pair = [nn.Sequential(*list(model.eval())[:end])(images).flatten().tolist() for model in (student, teacher)]
    wanted = sum((s - t) ** 2 for s, t in zip(*pair, strict=True)) / len(pair[0])
    assert made(images, labels).terms["features"].item() == pytest.approx(wanted, rel=1e-4)


def test_a_teacher_without_a_quantized_feature():
    recipe = QFD().with_options(teacher=Frozen())
    with pytest.raises(ValueError, match="the teacher's feature is not quantized"):
        recipe.objective(quantize(network()), network(), batches=[batch()])
