"""Dynamic ranges made fixed, so that an engine can use integers: another method, under another name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import images_of
from ..convert import plan_of, quantizers_of
from ..integers import settle_biases
from ..quantizers import build
from ..quantizers.frozen import FrozenMinMax
from ..quantizers.minmax import MinMax
from ..training import reestimate_batch_norm

DYNAMIC, FROZEN = "minmax", "minmax-frozen"


@torch.no_grad()
def freeze_ranges(student: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of ``student`` whose min-max ranges no longer depend on the batch: method ``minmax-frozen``.

    The range of an activation is the mean of the smallest and of the largest values over ``batches``, each quantized
    as in training; the range of a weight is its own. Zero is moved onto a level, see ``FrozenMinMax``. Batch norm is
    estimated again over ``batches``, for it meets other values now, and biases are settled (``settle_biases``). The
    accuracy is another one than with dynamic ranges: measure it, and report it under the new name.

    Reconstruction: DTQ has no such step.

    Args:
        student: quantized by ``minmax``, wholly or in part; not changed.
        batches: images, N x C x H x W, normalised as in training; a few hundred, in batches of the training's size.

    Raises:
        TypeError: batches that hold anything but tensors.
        ValueError: no quantizer is dynamic, one has a single bit, or there is no batch.
    """
    dynamic = {name: quantizer for name, quantizer in quantizers_of(student) if isinstance(quantizer, MinMax)}
    if not dynamic:
        raise ValueError("student has no min-max quantizer, so its ranges are fixed already; export it as it is")
    single = [name for name, quantizer in dynamic.items() if quantizer.bits == 1]
    if single:
        raise ValueError(f"a frozen range needs 2 bits or more to have a zero and a sign, {single[0]} has 1")
    batches = list(images_of(batches))
    for images in batches:
        if images.ndim != 4 or images.numel() == 0:
            raise ValueError(f"batches must hold images N x C x H x W, got {tuple(images.shape)}")
    ranges = _ranges(student, dynamic, batches)
    frozen = copy.deepcopy(student)
    for name, quantizer in dynamic.items():
        made = build(replace(quantizer.spec, method=FROZEN), quantizer.num_channels, quantizer.channel_dim)
        assert isinstance(made, FrozenMinMax)
        made.to(quantizer.enabled.device)
        made.set_range(*ranges[name])
        made.enabled.copy_(quantizer.enabled)
        parent, _, own = name.rpartition(".")
        setattr(frozen.get_submodule(parent), own, made)
    plan = plan_of(student)
    if plan is not None:
        rules = tuple(replace(rule, quantizer=FROZEN) if rule.quantizer == DYNAMIC else rule for rule in plan.rules)
        method = FROZEN if plan.quantizer == DYNAMIC else plan.quantizer
        frozen.__dict__["fewbits_plan"] = replace(plan, quantizer=method, rules=rules)
    reestimate_batch_norm(frozen, batches)
    settle_biases(frozen, batches[0])
    return frozen


def _ranges(
    student: nn.Module, dynamic: dict[str, MinMax], batches: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value of what each quantizer reads, mean over the batches."""
    seen: dict[str, list[Tensor]] = {name: [] for name in dynamic}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name].append(torch.stack([args[0].amin(), args[0].amax()]).float())

        return hook

    modes = [(module, module.training) for module in student.modules()]
    handles = [quantizer.register_forward_pre_hook(look(name)) for name, quantizer in dynamic.items()]
    device = next(student.parameters()).device
    try:
        student.eval()
        for images in batches:
            student(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    never = [name for name, extremes in seen.items() if not extremes]
    if never:
        raise ValueError(f"{never[0]} never ran; batches must hold at least one batch of real images")
    means = {name: torch.stack(extremes).mean(0) for name, extremes in seen.items()}
    return {name: (mean[0], mean[1]) for name, mean in means.items()}
