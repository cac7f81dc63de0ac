"""Where ranges start: the grid with the least squared error on real values.

A good start is worth more than most methods: ResNet-20 at 2/2 stood at 81 % after an epoch with it and at 38 % with
LSQ's own start. So every method starts here, the plain baseline included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import SMALLEST_STEP, to_codes

NUM_CANDIDATES = 100
MAX_SAMPLES = 2**17
"""Values that the search looks at; more change the step by less than a candidate."""


def sample(x: Tensor, num: int = MAX_SAMPLES) -> Tensor:
    """At most ``num`` values of ``x``, flat, evenly spread; the extremes are always among them."""
    flat = x.reshape(-1)
    if flat.numel() <= num:
        return flat
    stride = -(-flat.numel() // num)
    # An even stride would meet the same columns of every map: step through the values by an odd one.
    stride += 1 - stride % 2
    return torch.cat([flat[::stride], flat.min().reshape(1), flat.max().reshape(1)])


def fractions(like: Tensor) -> Tensor:
    """The candidate ranges as fractions of the largest value: 0.01, 0.02, ..., 1."""
    return torch.arange(1, NUM_CANDIDATES + 1, device=like.device, dtype=torch.float32) / NUM_CANDIDATES


def best_step(x_GN: Tensor, low: int, high: int) -> Tensor:
    """The step of least squared error for each group.

    Args:
        x_GN: G groups of N values that share a step.
        low: smallest code, at most 0.
        high: largest code, at least 1 (2-bit weights: -2 to 1).

    Returns:
        G positive steps; 1 for a group that is all zero.
    """
    largest_G1 = x_GN.abs().amax(1, keepdim=True)
    reach = max(high, -low)
    # Squares of values above 1e19 overflow: the search runs on values up to 1.
    unit_GN = x_GN / torch.where(largest_G1 > 0, largest_G1, 1.0)
    best_G1 = torch.full_like(largest_G1, torch.inf)
    step_G1 = torch.ones_like(largest_G1)
    for fraction in fractions(x_GN):
        # Ranges are tried over the larger side: 2-bit weights have two levels below zero and one above it.
        for side in {high, reach}:
            candidate = fraction / side
            error = (to_codes(unit_GN, candidate, low, high) * candidate - unit_GN).square().mean(1, keepdim=True)
            better = (error < best_G1) & (largest_G1 > 0)
            best_G1 = torch.where(better, error, best_G1)
            step_G1 = torch.where(better, (candidate * largest_G1).clamp(min=SMALLEST_STEP), step_G1)
    return step_G1[:, 0]


def best_affine(x: Tensor, num_steps: int) -> tuple[Tensor, int]:
    """Step and whole zero point of least squared error for signed values; zero is exactly a level.

    Codes run from ``-zero_point`` to ``num_steps - zero_point``.

    Args:
        x: flat values, some of them below zero.
        num_steps: ``2**bits - 1``.
    """
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if most - least <= 0:
        return torch.tensor(1.0), 0
    size = max(-least, most)
    x, least, most = x / size, least / size, most / size
    best, result = float("inf"), (torch.tensor(1.0), 0)
    for fraction in fractions(x).tolist():
        step = torch.tensor((most - least) * fraction / num_steps)
        # The range shrinks at both ends, give or take a level, or at the upper one alone: behind a SiLU at 4 bits the
        # first of these by itself has 1.2 to 1.4 times the error of the best grid.
        both, upper = round(-least * fraction / float(step)), round(-least / float(step))
        for zero_point in sorted({min(max(zero, 0), num_steps) for zero in (both - 1, both, both + 1, upper)}):
            codes = to_codes(x, step.to(x.device), -zero_point, num_steps - zero_point)
            error = float((codes * step.to(x.device) - x).square().mean())
            if error < best:
                best, result = error, ((step * size).clamp(min=SMALLEST_STEP), zero_point)
    return result


def best_range(x: Tensor, lowest: float, num_steps: int, symmetric: bool) -> float:
    """The upper end of least squared error of a grid from ``lowest`` (or minus the upper end) to the upper end.

    All ``num_steps + 1`` levels are spread over the range, ends included; zero need not be a level.
    """
    most = float(x.abs().max()) if symmetric else float(x.max()) - lowest
    if most <= 0:
        return 1.0 if symmetric else lowest + 1.0
    unit = x / most if symmetric else (x - lowest) / most
    best, result = float("inf"), 1.0
    for fraction in fractions(x).tolist():
        bottom = -fraction if symmetric else 0.0
        step = torch.tensor((fraction - bottom) / num_steps, device=x.device)
        error = float((to_codes(unit - bottom, step, 0, num_steps) * step + bottom - unit).square().mean())
        if error < best:
            best, result = error, max(fraction * most, SMALLEST_STEP * num_steps)
    return result if symmetric else lowest + result
