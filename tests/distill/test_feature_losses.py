"""Feature distances recomputed by slow loops, gradients included, and what they must not do."""

import math

import pytest
import torch
from torch import Tensor

from fewbits.distill.feature_losses import (
    attention_map_distance,
    centred_cosine,
    feature_distance,
    normalised_squared_error,
    squared_attention_distance,
)

Rows = list[list[int]]


def rows_of(shape: tuple[int, ...], axes: str) -> Rows:
    """Flat indices of each group of an N x C x H x W tensor, by loops."""
    n, c, h, w = shape
    flat = {
        (i, j, k, m): ((i * c + j) * h + k) * w + m
        for i in range(n)
        for j in range(c)
        for k in range(h)
        for m in range(w)
    }
    groups: dict[tuple[int, ...], list[int]] = {}
    for (i, j, _, _), index in flat.items():
        key = {"sample": (i,), "channel": (i, j), "batch": (j,)}[axes]
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def slow_cosine(student: Tensor, teacher: Tensor, axes: str, centred: bool) -> tuple[float, Tensor]:
    """Value and gradient at the student, -(v^ - cos u^) / ||c(u)|| over the number of groups, in double precision."""
    u_all, v_all = student.flatten().tolist(), teacher.flatten().tolist()
    rows, value, grad = rows_of(tuple(student.shape), axes), 0.0, [0.0] * len(u_all)
    for row in rows:
        u, v = [u_all[k] for k in row], [v_all[k] for k in row]
        if centred:
            u = [x - sum(u) / len(u) for x in u]
            v = [x - sum(v) / len(v) for x in v]
        norms = math.sqrt(sum(x * x for x in u)), math.sqrt(sum(x * x for x in v))
        u, v = [x / norms[0] for x in u], [x / norms[1] for x in v]
        cos = sum(a * b for a, b in zip(u, v, strict=True))
        value += (1 - cos) / len(rows)
        for k, a, b in zip(row, u, v, strict=True):
            grad[k] = -(b - cos * a) / norms[0] / len(rows)
    return value, torch.tensor(grad).view_as(student)


@pytest.mark.parametrize("axes", ["sample", "channel", "batch"])
@pytest.mark.parametrize("distance", ["centred_cosine", "cosine"])
def test_cosines(distance, axes):
    student, teacher = torch.rand(3, 4, 2, 3).requires_grad_(), torch.rand(3, 4, 2, 3)
    got = feature_distance(student, teacher, distance, axes)
    got.backward()
    value, grad = slow_cosine(student.detach(), teacher, axes, distance == "centred_cosine")
    assert got.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(student.grad, grad, rtol=1e-4, atol=1e-7)
    if distance == "centred_cosine":
        assert torch.equal(got, centred_cosine(student, teacher, axes))


@pytest.mark.parametrize("axes", ["sample", "channel", "batch"])
@pytest.mark.parametrize(("distance", "power"), [("l2", 2), ("l1", 1)])
def test_p_norms(distance, power, axes):
    student, teacher = torch.randn(3, 4, 2, 3).requires_grad_(), torch.randn(3, 4, 2, 3)
    got = feature_distance(student, teacher, distance, axes)
    got.backward()
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert got.item() == pytest.approx(sum(abs(s - t) ** power for s, t in pairs) / len(pairs), rel=1e-5)
    grad = [(2 * (s - t) if power == 2 else math.copysign(1, s - t)) / len(pairs) for s, t in pairs]
    torch.testing.assert_close(student.grad.flatten(), torch.tensor(grad))


@pytest.mark.parametrize("axes", ["sample", "channel", "batch"])
def test_scale_shift_and_sign(axes):
    """D(F, aS + b) = D(F, S) for a > 0; D(F, -S) = 2 - D(F, S); 0 and 2 at the ends."""
    student, teacher = torch.rand(3, 4, 5, 5), torch.rand(3, 4, 5, 5)
    plain = centred_cosine(student, teacher, axes).item()
    assert centred_cosine(7.5 * student - 3, teacher, axes).item() == pytest.approx(plain, rel=1e-5)
    assert centred_cosine(student, 0.02 * teacher + 9, axes).item() == pytest.approx(plain, rel=1e-3)
    assert centred_cosine(-student, teacher, axes).item() == pytest.approx(2 - plain, rel=1e-5)
    assert centred_cosine(student, 2 * student + 1, axes).item() == pytest.approx(0, abs=1e-5)
    # What centring is for: non-negative features look alike without it, and a shift is seen.
    assert feature_distance(student, teacher, "cosine", axes).item() < 0.5 < plain
    shifted = feature_distance(student + 3, teacher, "cosine", axes).item()
    assert shifted != pytest.approx(feature_distance(student, teacher, "cosine", axes).item(), rel=1e-2)


@pytest.mark.parametrize("axes", ["sample", "channel", "batch"])
def test_the_gradient_fights_neither_mean_nor_scale(axes):
    student, teacher = torch.rand(3, 4, 5, 5).requires_grad_(), torch.rand(3, 4, 5, 5)
    centred_cosine(student, teacher, axes).backward()
    for row in rows_of(tuple(student.shape), axes):
        grad, values = student.grad.flatten()[row].double(), student.detach().flatten()[row].double()
        size = grad.norm().item()
        assert size > 0
        assert abs(grad.sum().item()) < 1e-5 * size * len(row) ** 0.5
        assert abs((grad * (values - values.mean())).sum().item()) < 1e-5 * size * values.norm().item()


@pytest.mark.parametrize("axes", ["sample", "channel", "batch"])
def test_samples_are_averaged_and_not_one_vector(axes):
    """A batch of two pairs is the mean of the two, but for the axes that say otherwise."""
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    student[1] += 10  # in one common vector this offset would swamp everything
    alone = [centred_cosine(student[i : i + 1], teacher[i : i + 1], axes).item() for i in range(2)]
    both = centred_cosine(student, teacher, axes).item()
    if axes == "batch":
        assert both != pytest.approx(sum(alone) / 2, rel=1e-2)
    else:
        assert both == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_tokens_have_their_channels_last():
    student, teacher = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    for axes in ("sample", "channel", "batch"):
        torch.testing.assert_close(
            centred_cosine(*tokens, axes, channel_dim=-1), centred_cosine(student, teacher, axes)
        )
    maps = [x.movedim(1, -1) for x in (student, teacher)]
    torch.testing.assert_close(
        centred_cosine(*maps, "channel", channel_dim=-1), centred_cosine(student, teacher, "channel")
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0, 1e4, -3.7e5])
@pytest.mark.parametrize("axes", ["sample", "channel", "batch"])
def test_dead_maps_are_constants(constant, axes):
    """Value 1 and a gradient of exactly zero, for both sides; an eps in the denominator would give 1 / eps."""
    shape = (2, 3, 7, 7)
    for dead_side in (0, 1):
        pair = [torch.rand(shape), torch.rand(shape)]
        pair[dead_side] = torch.full(shape, constant)
        for x in pair:
            x.requires_grad_()
        got = centred_cosine(pair[0], pair[1], axes)
        got.backward()
        assert got.item() == 1.0
        assert not pair[0].grad.any()
        assert not pair[1].grad.any()


def test_one_dead_map_leaves_the_others_their_gradient():
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    student[0, 1] = 0.3
    student.requires_grad_()
    centred_cosine(student, teacher, "channel").backward()
    sizes = student.grad.flatten(2).norm(dim=2)
    assert sizes[0, 1].item() == 0
    assert int((sizes > 0).sum()) == 5
    assert float(sizes.max()) < 10


def test_a_live_map_just_above_the_threshold():
    """Root mean square 1e-6 decides: below it nothing, above it the true, large gradient."""
    pattern, teacher = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([[0.5, 0.1, 0.9, 0.3]])
    for size, is_alive in ((0.5e-6, False), (2e-6, True)):
        student = (size * pattern).requires_grad_()
        centred_cosine(student, teacher).backward()
        assert bool(student.grad.any()) == is_alive
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    student, teacher = (100 * torch.rand(2, 8, 16, 16)).to(dtype), (100 * torch.rand(2, 8, 16, 16)).to(dtype)
    wanted = centred_cosine(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = centred_cosine(student, teacher)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_normalised_squared_error():
    student, teacher = torch.randn(3, 2, 2, 2).requires_grad_(), torch.randn(3, 2, 2, 2)
    for reduction in ("sum", "mean"):
        value = 0.0
        for s, t in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
            norms = math.sqrt(sum(x * x for x in s)), math.sqrt(sum(x * x for x in t))
            errors = [(a / norms[0] - b / norms[1]) ** 2 for a, b in zip(s, t, strict=True)]
            value += sum(errors) / 3 / (1 if reduction == "sum" else len(errors))
        assert normalised_squared_error(student, teacher, reduction).item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(
        normalised_squared_error(student, teacher), 2 * feature_distance(student, teacher, "cosine")
    )
    check_gradient(lambda s: normalised_squared_error(s, teacher), student.detach())


def slow_attention(x: Tensor) -> list[list[float]]:
    maps = []
    for sample in x.tolist():
        height, width = len(sample[0]), len(sample[0][0])
        a = [sum(abs(channel[i][j]) for channel in sample) for i in range(height) for j in range(width)]
        norm = math.sqrt(sum(v * v for v in a))
        maps.append([v / norm for v in a])
    return maps


@pytest.mark.parametrize("form", ["mean_squared", "norm", "printed"])
def test_attention_maps(form):
    student, teacher = torch.randn(3, 4, 2, 3), torch.randn(3, 5, 2, 3)  # the channels may differ
    squares = [
        sum((s - t) ** 2 for s, t in zip(s_map, t_map, strict=True))
        for s_map, t_map in zip(slow_attention(student), slow_attention(teacher), strict=True)
    ]
    wanted = {
        "mean_squared": sum(squares) / (3 * 6),
        "norm": sum(math.sqrt(x) for x in squares) / 3,
        "printed": sum(math.sqrt(x) for x in squares),
    }
    assert attention_map_distance(student, teacher, form).item() == pytest.approx(wanted[form], rel=1e-5)
    check_gradient(lambda s: attention_map_distance(s, teacher, form), student)


@pytest.mark.parametrize("form", ["mean_squared", "norm", "printed"])
def test_attention_where_a_gradient_could_break(form):
    """Equal maps (the norm's kink), dead maps: zero or finite, never NaN."""
    maps = torch.rand(2, 3, 4, 4).requires_grad_()
    attention_map_distance(maps, 2 * maps.detach(), form).backward()
    assert torch.isfinite(maps.grad).all()
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_map_distance(dead, maps.detach(), form).backward()
    assert not dead.grad.any()


def test_squared_attention():
    student, teacher = torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2, 3)
    value = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        maps = []
        for sample in (s, t):
            a = [sum(c[i][j] ** 2 for c in sample) / 4 for i in range(2) for j in range(3)]
            maps.append([v / max(a) for v in a])
        value += sum((p - q) ** 2 for p, q in zip(*maps, strict=True)) / 18
    assert squared_attention_distance(student, teacher).item() == pytest.approx(value, rel=1e-5)
    check_gradient(lambda s: squared_attention_distance(s, teacher), student)
    dead = torch.zeros(1, 2, 2, 2, requires_grad=True)
    squared_attention_distance(dead, torch.rand(1, 2, 2, 2)).backward()
    assert not dead.grad.any()


def test_wrong_words():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match="axes must be 'sample' or 'channel' or 'batch', got 'pixel'"):
        centred_cosine(x, x, "pixel")
    with pytest.raises(ValueError, match=r"distance must be .* got 'l3'"):
        feature_distance(x, x, "l3")
    with pytest.raises(ValueError, match=r"form must be .* got 'sum'"):
        attention_map_distance(x, x, "sum")
    with pytest.raises(ValueError, match="'channel' compares maps, got a vector"):
        centred_cosine(x, x, "channel")


def check_gradient(loss, at: Tensor, num: int = 10) -> None:
    """Against central differences in a few coordinates."""
    leaf = at.clone().requires_grad_()
    loss(leaf).backward()
    for index in range(0, at.numel(), max(at.numel() // num, 1)):
        step = torch.zeros(at.numel())
        step[index] = 1e-2
        step = step.view_as(at)
        with torch.no_grad():
            slope = (loss(at + step) - loss(at - step)).item() / 2e-2
        assert leaf.grad.flatten()[index].item() == pytest.approx(slope, rel=0.02, abs=2e-4)
