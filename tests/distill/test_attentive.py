"""Attentive alignment, recomputed by slow loops, gradients included."""

import math

import pytest
import torch
from torch import Tensor

from fewbits.distill.attentive import AttentiveTransfer, attended_distance

SHAPE = (3, 4, 2, 5)  # N, C, H, W


def slow_distance(student: Tensor, teacher: Tensor, attention: list[list[float]]) -> float:
    """sum_n sum_c (C / 2) a_nc sum_hw (s - t)^2 / N."""
    n, c, h, w = student.shape
    total = 0.0
    for i in range(n):
        for j in range(c):
            norm = sum(
                (student[i, j, y, x].item() - teacher[i, j, y, x].item()) ** 2 for y in range(h) for x in range(w)
            )
            total += attention[i][j] * norm
    return c / 2 * total / n


def slow_attention(module: AttentiveTransfer, maps: Tensor) -> list[list[float]]:
    hidden, score, bias = module.hidden.weight.tolist(), module.score.weight.tolist()[0], module.bias.tolist()
    rows = []
    for image in maps.tolist():
        scores = []
        for channel, b in zip(image, bias, strict=True):
            pixels = [value for row in channel for value in row]
            units = [max(sum(w * p for w, p in zip(row, pixels, strict=True)), 0.0) for row in hidden]
            scores.append(sum(w * u for w, u in zip(score, units, strict=True)) + b)
        powers = [math.exp(value) for value in scores]
        rows.append([power / sum(powers) for power in powers])
    return rows


def module(shape: tuple[int, ...] = SHAPE) -> AttentiveTransfer:
    made = AttentiveTransfer(*shape[1:])
    with torch.no_grad():
        made.bias.normal_()
    return made


def test_attention_by_loops():
    made, maps = module(), torch.randn(SHAPE)
    attention = made(maps)
    torch.testing.assert_close(attention, torch.tensor(slow_attention(made, maps)))
    torch.testing.assert_close(attention.sum(1), torch.ones(SHAPE[0]))  # over the channels, not over the batch


def test_the_module_is_the_authors():
    """H hidden units for H x W pixels, no bias but one for each channel, which starts at zero."""
    made = AttentiveTransfer(6, 5, 7)
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "bias": (6,),
        "hidden.weight": (5, 35),
        "score.weight": (1, 5),
    }
    assert not made.bias.any()


def test_all_channels_share_the_two_layers():
    made, maps = AttentiveTransfer(*SHAPE[1:]), torch.randn(SHAPE)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(made(maps[:, order]), made(maps)[:, order])


def test_distance_and_both_gradients_by_loops():
    student, teacher, made = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE), module()
    attention = made(teacher)
    attention.retain_grad()
    got = attended_distance(student, teacher, attention)
    got.backward()
    assert got.item() == pytest.approx(slow_distance(student, teacher, attention.tolist()), rel=1e-5)
    n, c, h, w = SHAPE
    slow = torch.zeros(SHAPE)
    slow_a = torch.zeros(n, c)
    for i in range(n):
        for j in range(c):
            for y in range(h):
                for x in range(w):
                    difference = student[i, j, y, x].item() - teacher[i, j, y, x].item()
                    slow[i, j, y, x] = c / n * attention[i, j].item() * difference
                    slow_a[i, j] += c / (2 * n) * difference**2
    torch.testing.assert_close(student.grad, slow)
    torch.testing.assert_close(attention.grad, slow_a)
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.parameters())


def test_uniform_attention_is_the_plain_distance():
    """Pitfall 4: without C / 2 it would be C / 2 times smaller."""
    student, teacher = torch.randn(SHAPE), torch.randn(SHAPE)
    plain = 0.5 * (student - teacher).square().sum().item() / SHAPE[0]
    uniform = [[1 / SHAPE[1]] * SHAPE[1]] * SHAPE[0]
    assert attended_distance(student, teacher).item() == pytest.approx(plain, rel=1e-5)
    assert attended_distance(student, teacher, torch.tensor(uniform)).item() == pytest.approx(plain, rel=1e-5)
    assert slow_distance(student, teacher, uniform) == pytest.approx(plain, rel=1e-5)


def test_weights_that_all_images_share():
    student, teacher, weights = torch.randn(SHAPE), torch.randn(SHAPE), torch.softmax(torch.randn(SHAPE[1]), 0)
    slow = slow_distance(student, teacher, [weights.tolist()] * SHAPE[0])
    assert attended_distance(student, teacher, weights).item() == pytest.approx(slow, rel=1e-5)


def test_the_batch_does_not_scale_the_loss():
    student, teacher = torch.randn(SHAPE), torch.randn(SHAPE)
    once, twice = (
        attended_distance(student, teacher),
        attended_distance(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)),
    )
    torch.testing.assert_close(once, twice)


def test_entropy_says_how_concentrated_attention_is():
    made, maps = AttentiveTransfer(*SHAPE[1:]), torch.randn(SHAPE)
    with torch.no_grad():
        made.score.weight.zero_()
        made(maps)
        assert made.entropy.item() == pytest.approx(1.0)
        made.bias[1] = 50.0
        made(maps)
        assert made.entropy.item() == pytest.approx(0.0, abs=1e-6)
        made.bias.copy_(torch.randn(SHAPE[1]))
        rows = made(maps).tolist()
    slow = sum(-a * math.log(a) for row in rows for a in row) / len(rows) / math.log(SHAPE[1])
    assert made.entropy.item() == pytest.approx(slow, rel=1e-5)
    assert "entropy" in made.state_dict()


def test_odd_maps():
    one = AttentiveTransfer(1, 2, 2)  # a single channel has all the attention
    assert one(torch.randn(3, 1, 2, 2)).tolist() == [[1.0]] * 3
    made = module()
    for maps in (torch.zeros(SHAPE), torch.full(SHAPE, 1e4), torch.full(SHAPE, -1e4)):
        student = torch.zeros(SHAPE, requires_grad=True)
        attended_distance(student, maps, made(maps)).backward()
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())


def test_half_precision_is_summed_in_float():
    student, teacher = torch.full((1, 1, 64, 64), 1.0), torch.full((1, 1, 64, 64), 2.0)
    assert attended_distance(student.bfloat16(), teacher.bfloat16()).item() == 2048.0
    with torch.autocast("cpu", torch.bfloat16):
        assert module()(torch.randn(SHAPE)).dtype == torch.float32
