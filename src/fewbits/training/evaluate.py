"""Accuracy, and batch norm re-estimated for the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.inference_mode()
def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Right answers and all answers of ``model`` in eval mode; the mode is put back afterwards.

    Args:
        model: images in, N x C logits out.
        batches: images, N x C x H x W, normalised, and labels, N.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    correct = total = 0
    for images, labels in batches:
        if not len(labels):
            continue  # the last batch of a split may leave nothing for the later processes
        predicted = model(images.to(device)).argmax(1).cpu()
        correct += int((predicted == labels).sum())
        total += len(labels)
    for module, mode in modes:
        module.training = mode
    return correct, total


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of right answers, 0 to 1.

    Raises:
        ValueError: there is no image.
    """
    correct, total = count_correct(model, batches)
    if total == 0:
        raise ValueError("batches holds no image; there is nothing to measure accuracy on")
    return correct / total


def accuracy_over_processes(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator
) -> float:
    """The same where each process has its share of the batches; all get the same number."""
    counts = torch.tensor(count_correct(model, batches), device=accelerator.device, dtype=torch.float64)
    correct, total = cast(Tensor, accelerator.reduce(counts, reduction="sum")).tolist()
    return float(correct / total)


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace running averages by plain averages over ``batches``, everything else in eval mode.

    The running averages of the last steps mix weights that are gone. Batches with NaN or infinite pixels are left out,
    as they are in training. Returns the batches that were used.

    Raises:
        ValueError: no batch is left; the running averages stay as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return 0
    finite = (images for images in batches if len(images) and bool(torch.isfinite(images).all()))
    first = next(finite, None)
    if first is None:
        raise ValueError("batches holds no batch of finite images; batch norm cannot be estimated from it")
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    used = 0
    for images in chain([first], finite):
        model(images.to(device))
        used += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode
    return used
