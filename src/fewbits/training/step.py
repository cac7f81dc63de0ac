"""One optimizer step's gradients, and the numbers that its dropout draws."""

from __future__ import annotations

import contextlib
import math
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..distill import Losses, Objective


def backward(
    accelerator: Accelerator, model: nn.Module, images: Tensor, labels: Tensor, num_parts: int
) -> dict[str, Tensor]:
    """Gradients of one step, in micro-batches.

    Args:
        accelerator: precision and processes.
        model: the objective, prepared.
        images: of this process, N x C x H x W.
        labels: N.
        num_parts: micro-batches; it divides N.

    Returns:
        The loss (``"loss"``) and its terms (``"loss/NAME"``), means over micro-batches and processes.
    """
    means: dict[str, Tensor] = {}
    for part, (x, y) in enumerate(zip(images.chunk(num_parts), labels.chunk(num_parts), strict=True)):
        is_last = part == num_parts - 1
        hold = contextlib.nullcontext() if is_last else accelerator.no_sync(model)
        with hold:
            with accelerator.autocast():
                losses: Losses = model(x, y)
            accelerator.backward(losses.total / num_parts)
        named = {"loss": losses.total.detach(), **{f"loss/{name}": v for name, v in losses.terms.items()}}
        means = {name: means.get(name, 0) + value.float() / num_parts for name, value in named.items()}
    reduced = cast(Tensor, accelerator.reduce(torch.stack(list(means.values())), reduction="mean"))
    return dict(zip(means, reduced.unbind(), strict=True))


def clip_gradients(accelerator: Accelerator, objective: Objective, most: float | None) -> Tensor:
    """Scale gradients down to a norm of at most ``most``, each trained network by itself, helpers with the student.

    A teacher that is trained along is another optimisation problem: its gradient must not shrink the student's.

    Returns:
        The norm of all gradients before that.
    """
    networks = objective.networks
    groups = [[*networks.network(group.network).parameters()] for group in objective.phase.trains]
    groups[0].extend(networks.helpers.parameters())
    norms = [cast(Tensor, accelerator.clip_grad_norm_(group, most or math.inf)) for group in groups]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a step draws, dropout's masks say: nothing is left to restore on resume."""
    torch.manual_seed((seed * 1_000_003 + step * 1_009 + rank) % 2**63)
