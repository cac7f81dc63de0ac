"""Pure functions of features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]


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
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    errors_ND = torch.flatten(student_N.float() - teacher_N.float(), 1).square()
    return (errors_ND.sum(1) if reduction == "sum" else errors_ND.mean(1)).mean()
