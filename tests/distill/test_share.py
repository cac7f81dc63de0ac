"""The shares of the terms in the gradient, against explicit backward passes; and that measuring leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.calibration import calibrate
from fewbits.convert import quantize
from fewbits.distill import CrossEntropy, FeatureDistance, Group, LogitDistance, Networks, Objective, Phase, Term
from fewbits.distill.logit_losses import cross_entropy, kl_divergence
from fewbits.distill.share import gradient_shares
from fewbits.recipes import QFD


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)


HEAD = "8"


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(6, 3),
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0, 2])


def objective(*terms: Term, **options: Any) -> Objective:
    images, _ = batch()
    student = quantize(network(), 4, 4, residual=None)
    calibrate(student, [images])
    return Objective(Networks(student, network(), images[:2]), Phase("phase", 1.0, terms, **options))


def norm_by_backward(model: nn.Module, loss: Tensor) -> float:
    """Of the gradient with respect to everything but the head, by an ordinary backward pass, element by element."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    squares = 0.0
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{HEAD}.") and parameter.grad is not None:
            squares += sum(value**2 for value in parameter.grad.double().flatten().tolist())
    model.zero_grad()
    return squares**0.5


def test_shares_are_ratios_of_explicit_gradients():
    made = objective(CrossEntropy(0.7), LogitDistance(2.0, temperature=3.0), FeatureDistance(0.25))
    made.eval()  # no dropout: the passes below are the same
    images, labels = batch()
    shares = gradient_shares(made, images, labels)
    student, teacher = made.networks.student, made.networks.teacher
    logits, feature = student(images), student[:8](images)
    with torch.no_grad():
        target, target_feature = teacher(images), teacher[:8](images)
    labelled = norm_by_backward(student, 0.7 * cross_entropy(logits, labels))
    assert labelled > 0
    distance = (feature - target_feature).square().sum(dim=1).mean()
    assert shares == {
        "cross_entropy": pytest.approx(1.0),
        "logits": pytest.approx(norm_by_backward(student, 2 * kl_divergence(target, logits, 3.0)) / labelled, rel=1e-4),
        "features": pytest.approx(norm_by_backward(student, 0.25 * distance) / labelled, rel=1e-4),
    }


def test_each_network_is_compared_with_its_own_cross_entropy():
    terms = (CrossEntropy(), LogitDistance(0.5), CrossEntropy(3.0, "teacher"), LogitDistance(0.5, "teacher"))
    made = objective(*terms, trains=(Group("student"), Group("teacher")))
    made.eval()
    images, labels = batch()
    shares = gradient_shares(made, images, labels)
    student, teacher = made.networks.student(images), made.networks.teacher(images)
    of_student = norm_by_backward(made.networks.student, cross_entropy(student, labels))
    of_teacher = norm_by_backward(made.networks.teacher, 3 * cross_entropy(teacher, labels))
    to_student = norm_by_backward(made.networks.student, 0.5 * kl_divergence(teacher.detach(), student))
    to_teacher = norm_by_backward(made.networks.teacher, 0.5 * kl_divergence(student.detach(), teacher))
    assert shares == {
        "cross_entropy": pytest.approx(1.0),
        "logits": pytest.approx(to_student / of_student, rel=1e-4),
        "teacher_cross_entropy": pytest.approx(1.0),
        "teacher_logits": pytest.approx(to_teacher / of_teacher, rel=1e-4),
    }


def test_a_weight_scales_its_share():
    images, labels = batch()
    one, three = (objective(CrossEntropy(), FeatureDistance(weight)) for weight in (0.1, 0.3))
    three.networks.load_state_dict(one.networks.state_dict())
    shares = [gradient_shares(made.eval(), images, labels)["features"] for made in (one, three)]
    assert shares[1] == pytest.approx(3 * shares[0], rel=1e-4)


def test_measuring_leaves_no_trace():
    """In training mode: batch norm moves its averages and dropout draws numbers."""
    made = objective(CrossEntropy(), LogitDistance(), FeatureDistance())
    images, labels = batch()
    before, state = copy.deepcopy(made.networks.state_dict()), torch.get_rng_state()
    modes = [module.training for module in made.modules()]
    assert gradient_shares(made, images, labels)["features"] > 0
    assert all(torch.equal(value, before[key]) for key, value in made.networks.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in made.networks.parameters())
    assert [module.training for module in made.modules()] == modes
    assert not made._hooks.features
    made(images, labels)  # what was to be shown to be undone does happen without it
    assert not torch.equal(made.networks.student[1].running_mean, before["student.1.running_mean"])
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_phase_of_the_teacher():
    images, labels = batch()
    teacher = network()
    student = quantize(teacher, 4, 4, residual=None)
    first = QFD(bits=2).objective(student, teacher, batches=[images])
    assert gradient_shares(first, images, labels) == {"teacher_cross_entropy": pytest.approx(1.0)}


def test_without_a_cross_entropy_there_is_nothing_to_compare_with():
    images, labels = batch()
    assert gradient_shares(objective(LogitDistance(), FeatureDistance()), images, labels) == {}
    assert gradient_shares(objective(CrossEntropy(0.0), FeatureDistance()), images, labels) == {}
