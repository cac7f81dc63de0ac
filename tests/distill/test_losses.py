"""The pure functions, recomputed by slow loops, gradients included."""

import math

import pytest
import torch
from torch import Tensor

from fewbits.distill.feature_losses import squared_error
from fewbits.distill.logit_losses import cross_entropy, kl_divergence


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def slow_cross_entropy(
    logits: list[list[float]], labels: list[int], smoothing: float
) -> tuple[float, list[list[float]]]:
    """Value and gradient: targets (1 - e) one-hot + e / C."""
    n, c = len(logits), len(logits[0])
    value, grad = 0.0, []
    for row, label in zip(logits, labels, strict=True):
        p = softmax(row)
        target = [(1 - smoothing) * (k == label) + smoothing / c for k in range(c)]
        value -= sum(t * math.log(q) for t, q in zip(target, p, strict=True)) / n
        grad.append([(q - t) / n for t, q in zip(target, p, strict=True)])
    return value, grad


def slow_kl(
    teacher: list[list[float]], student: list[list[float]], temperature: float
) -> tuple[float, list[list[float]]]:
    n, value, grad = len(teacher), 0.0, []
    for t_row, s_row in zip(teacher, student, strict=True):
        p, q = softmax([v / temperature for v in t_row]), softmax([v / temperature for v in s_row])
        value += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / n
        grad.append([temperature * (b - a) / n for a, b in zip(p, q, strict=True)])
    return value, grad


def slow_squared_error(student: Tensor, teacher: Tensor, reduction: str) -> tuple[float, list[float]]:
    n, size = len(student), student[0].numel()
    divisor = n * (size if reduction == "mean" else 1)
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    return sum((s - t) ** 2 for s, t in pairs) / divisor, [2 * (s - t) / divisor for s, t in pairs]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float):
    logits, labels = torch.randn(5, 4).mul(3).requires_grad_(), torch.tensor([0, 3, 1, 1, 2])
    got = cross_entropy(logits, labels, smoothing)
    got.backward()
    value, grad = slow_cross_entropy(logits.tolist(), labels.tolist(), smoothing)
    assert got.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(logits.grad, torch.tensor(grad))


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0, -100]])
def test_labels_out_of_range_are_named(labels: list[int]):
    """-100 too: PyTorch would leave such an image out in silence."""
    bad = max(labels, key=abs)
    with pytest.raises(ValueError, match=rf"labels must lie in 0\.\.3, the network has 4 outputs, got {bad}"):
        cross_entropy(torch.zeros(2, 4), torch.tensor(labels))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_kl_divergence(temperature: float):
    teacher, student = torch.randn(5, 4).mul(3).requires_grad_(), torch.randn(5, 4).mul(3).requires_grad_()
    got = kl_divergence(teacher.detach(), student, temperature)
    got.backward()
    value, grad = slow_kl(teacher.tolist(), student.tolist(), temperature)
    assert got.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(student.grad, torch.tensor(grad))
    assert kl_divergence(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-6)


def test_the_factor_keeps_the_gradient_s_size():
    """For high temperatures T^2 KL tends to half the squared distance of centred logits, over C: no T is left."""
    teacher, student = torch.randn(3, 5), torch.randn(3, 5)
    centred = (teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True))
    limit = centred.square().sum(1).mean() / (2 * 5)
    assert kl_divergence(teacher.double(), student.double(), 100.0).item() == pytest.approx(limit.item(), rel=0.05)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive(temperature: float):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 2, 2), (1, 1)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_squared_error(shape: tuple[int, ...], reduction: str):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    got = squared_error(student, teacher, reduction)  # type: ignore[arg-type]
    got.backward()
    value, grad = slow_squared_error(student, teacher, reduction)
    assert got.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(student.grad.flatten(), torch.tensor(grad))


def test_sum_is_the_mean_times_the_dimension():
    student, teacher = torch.randn(4, 64), torch.randn(4, 64)
    ratio = squared_error(student, teacher, "sum") / squared_error(student, teacher, "mean")
    assert ratio.item() == pytest.approx(64)


def test_another_reduction():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        squared_error(torch.zeros(1, 2), torch.zeros(1, 2), "max")  # type: ignore[arg-type]


def test_half_precision_is_summed_in_float():
    student, teacher = torch.full((2, 4096), 1.0), torch.full((2, 4096), 2.0)
    assert squared_error(student.bfloat16(), teacher.bfloat16()).item() == 4096.0
    logits = torch.randn(4, 8).bfloat16()
    assert cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).dtype == torch.float32
    assert kl_divergence(logits, logits).dtype == torch.float32
