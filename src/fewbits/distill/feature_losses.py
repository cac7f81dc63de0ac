"""Pure functions of features. All compute in float32, also under automatic mixed precision.

Shape suffixes: N samples, C channels, H x W pixels, D elements of one feature, R groups (rows) of n elements each.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]
Distance = Literal["centred_cosine", "cosine", "l2", "l1"]
Axes = Literal["sample", "channel", "batch"]
AttentionForm = Literal["mean_squared", "norm", "printed"]

DEAD = 1e-6
"""Root mean square under which a map counts as dead; float32 leaves about so much of a constant of size 1."""


def squared_error(student_N: Tensor, teacher_N: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Squared distance of two features, mean over the batch.

    Args:
        student_N: N features of any shape.
        teacher_N: their targets, of the same shape.
        reduction: over the elements of one feature: ``"sum"`` or ``"mean"``. They differ by the number of elements, 64
            for ResNet-20: state which.

    >>> squared_error(torch.ones(2, 4), torch.zeros(2, 4)).item()
    4.0
    >>> squared_error(torch.ones(2, 4), torch.zeros(2, 4), "mean").item()
    1.0
    """
    _check("reduction", reduction, ("mean", "sum"))
    errors_ND = torch.flatten(student_N.float() - teacher_N.float(), 1).square()
    return (errors_ND.sum(1) if reduction == "sum" else errors_ND.mean(1)).mean()


def normalised_squared_error(student_N: Tensor, teacher_N: Tensor, reduction: Reduction = "sum") -> Tensor:
    """|| F_s / ||F_s|| - F_t / ||F_t|| ||^2, each norm over one sample's feature; mean over the batch.

    0 to 4 with the sum, where it is 2 (1 - cosine). A dead feature counts as zero and gets no gradient.

    Args:
        student_N: N features of any shape.
        teacher_N: their targets, of the same shape.
        reduction: over the elements of one feature.

    >>> normalised_squared_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])).item()
    0.0
    """
    return squared_error(
        _unit(torch.flatten(student_N.float(), 1)), _unit(torch.flatten(teacher_N.float(), 1)), reduction
    )


def centred_cosine(student: Tensor, teacher: Tensor, axes: Axes = "sample", channel_dim: int = 1) -> Tensor:
    """The centred cosine distance of FTL (Du et al., ECCV 2020): one minus Pearson's correlation, 0 to 2.

    Forward:  D(u, v) = 1 - <c(u), c(v)> / (||c(u)|| ||c(v)||),  c(u) = u - mean(u);  mean over the groups
    Backward: dD/du = -(v^ - cos u^) / ||c(u)||, with u^ and v^ the centred units: orthogonal to u^ and to constants

    Where one of the two is dead, a constant up to rounding (root mean square of c below 1e-6, or 1e-6 of the mean),
    D is 1 and the gradient exactly zero for both.

    Reconstruction: the abstract names the distance; the axes are a switch.

    Args:
        student: N x C x H x W, or any shape with at least two dimensions.
        teacher: of the same shape.
        axes: which elements are centred and multiplied as one vector: all of one ``"sample"``, those of one sample's
            ``"channel"``, or those of one channel over the whole ``"batch"`` and all positions.
        channel_dim: where the channels are: 1 for maps, -1 for tokens.

    Raises:
        ValueError: ``axes`` is unknown, or a feature without positions is compared channel by channel.

    >>> u = torch.tensor([[1.0, 2.0, 4.0]])
    >>> round(centred_cosine(u, 3 * u + 5).item(), 6), round(centred_cosine(u, -u).item(), 6)
    (0.0, 2.0)
    """
    return _distances(student, teacher, "centred_cosine", axes, channel_dim).mean()


def feature_distance(
    student: Tensor, teacher: Tensor, distance: Distance = "centred_cosine", axes: Axes = "sample", channel_dim: int = 1
) -> Tensor:
    """FTL's distance or one of its rivals, mean over the same groups.

    ``"centred_cosine"``: see there; ``"cosine"``: the same without the centring; ``"l2"`` and ``"l1"``: mean squared
    and mean absolute difference of the elements.

    Args:
        student: N x C x H x W, or any shape with at least two dimensions.
        teacher: of the same shape.
        distance: which one.
        axes: see ``centred_cosine``; without influence on l2 and l1, which are means over everything.
        channel_dim: see ``centred_cosine``.

    >>> feature_distance(torch.ones(1, 4), torch.zeros(1, 4), "l2").item()
    1.0
    """
    _check("distance", distance, ("centred_cosine", "cosine", "l2", "l1"))
    return _distances(student, teacher, distance, axes, channel_dim).mean()


def attention_map_distance(student: Tensor, teacher: Tensor, form: AttentionForm = "mean_squared") -> Tensor:
    """L_att of Zhuang et al. (arXiv 1908.04680, equation 6): distance of L2-normalised attention maps.

    A = sum over channels of |F|, flattened per sample; Q = A / ||A||_2; with N samples of H x W positions:

    ``"mean_squared"``: mean over samples and positions of (Q_s - Q_t)^2, at most 2 / (H W);
    ``"norm"``: mean over samples of ||Q_s - Q_t||_2;
    ``"printed"``: sum over samples of ||Q_s - Q_t||_2, as equation 6 has it.

    Where student and teacher agree, the norm's gradient is zero. A dead map counts as zero and gets no gradient.

    Reconstruction: the default; the printed form with the paper's weight of 50 would swamp the cross-entropy.

    Args:
        student: N x C x H x W; the number of channels may differ.
        teacher: N x C' x H x W; for Zhuang the quantized feature of the full-precision network.
        form: the reduction.

    >>> a = torch.zeros(1, 1, 1, 2); a[..., 0] = 2.0
    >>> attention_map_distance(a, a.flip(3)).item(), round(attention_map_distance(a, a.flip(3), "norm").item(), 4)
    (1.0, 1.4142)
    """
    _check("form", form, ("mean_squared", "norm", "printed"))
    difference_NP = _unit(torch.flatten(student.float().abs().sum(1), 1)) - _unit(
        torch.flatten(teacher.float().abs().sum(1), 1)
    )
    if form == "mean_squared":
        return difference_NP.square().mean()
    distances_N = _norm(difference_NP, 0.0)
    return distances_N.mean() if form == "norm" else distances_N.sum()


def squared_attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Block-wise attention matching of Real-to-Binary nets (Martinez et al., ICLR 2020, in the code of larq/zoo).

    A = mean over channels of F^2, flattened per sample, divided by its maximum; mean over samples and positions of
    (A_s - A_t)^2. A dead map counts as zero and gets no gradient.

    Args:
        student: N x C x H x W; the number of channels may differ.
        teacher: N x C' x H x W.

    >>> squared_attention_distance(torch.ones(1, 2, 1, 1), torch.full((1, 3, 1, 1), 5.0)).item()
    0.0
    """
    return (_squared_attention(student) - _squared_attention(teacher)).square().mean()


def _squared_attention(x: Tensor) -> Tensor:
    a_NP = torch.flatten(x.float().square().mean(1), 1)
    most_N1 = a_NP.amax(1, keepdim=True)
    is_alive = most_N1 > DEAD**2
    return torch.where(is_alive, a_NP / torch.where(is_alive, most_N1, 1.0), 0.0)


def _distances(student: Tensor, teacher: Tensor, distance: Distance, axes: Axes, channel_dim: int) -> Tensor:
    u_Rn, v_Rn = _rows(student.float(), axes, channel_dim), _rows(teacher.float(), axes, channel_dim)
    if distance == "l2":
        return (u_Rn - v_Rn).square().mean(1)
    if distance == "l1":
        return (u_Rn - v_Rn).abs().mean(1)
    if distance == "cosine":
        return 1.0 - (_unit(u_Rn) * _unit(v_Rn)).sum(1)
    means = u_Rn.mean(1, keepdim=True), v_Rn.mean(1, keepdim=True)
    units = [_unit(x - mean, mean) for x, mean in zip((u_Rn, v_Rn), means, strict=True)]
    return 1.0 - (units[0] * units[1]).sum(1)


def _rows(x: Tensor, axes: Axes, channel_dim: int) -> Tensor:
    """Groups x elements."""
    _check("axes", axes, ("sample", "channel", "batch"))
    if axes == "sample":
        return torch.flatten(x, 1)
    x = x.movedim(channel_dim, 1)
    if axes == "batch":
        return torch.flatten(x.transpose(0, 1), 1)
    if x.ndim == 2:
        raise ValueError("axes 'channel' compares maps, got a vector for each image; use axes 'sample' or 'batch'")
    return torch.flatten(x, 0, 1).flatten(1)


def _norm(x_Rn: Tensor, least: Tensor | float) -> Tensor:
    """Norms; below ``least`` they are exactly zero, with a gradient of exactly zero."""
    squares = x_Rn.square().sum(1, keepdim=True)
    is_alive = squares > least**2
    return torch.where(is_alive, torch.sqrt(torch.where(is_alive, squares, 1.0)), 0.0)


def _unit(x_Rn: Tensor, mean_R1: Tensor | None = None) -> Tensor:
    """Rows of norm 1; zero, with a gradient of exactly zero, where a row is dead.

    An eps in the denominator alone would give dead rows gradients of the order 1 / eps.

    Args:
        x_Rn: rows.
        mean_R1: what was subtracted from them: float32 leaves 1e-7 of it behind.
    """
    least = DEAD if mean_R1 is None else DEAD * mean_R1.detach().abs().clamp(min=1.0)
    norms = _norm(x_Rn, least * x_Rn.shape[1] ** 0.5)
    is_alive = norms > 0
    return torch.where(is_alive, x_Rn / torch.where(is_alive, norms, 1.0), 0.0)


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
