"""What a run needs before its first step: processes and device, optimizer, compilation, length of an epoch."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ..data import Dataset
from ..distill import Objective
from ..quantizers import fused, native
from ..recipes import Recipe
from .compiling import compiled
from .settings import Settings


def make_accelerator(settings: Settings) -> Accelerator:
    """Accelerate's view of the processes and the device.

    Raises:
        ValueError: fewer processes than asked for take part, or there is no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no GPU; use --device auto or cpu")
    # Accelerate keeps its settings for the whole process; a second run in it may have others.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # Asked for "any device" where there is none but the processor, Accelerate would not see the other processes.
    is_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=is_cpu, mixed_precision="bf16" if settings.precision == "bf16" else "no")
    if settings.processes is not None and accelerator.num_processes != settings.processes:
        raise ValueError(
            f"processes={settings.processes} were asked for, but {accelerator.num_processes} take part; start with "
            f"'torchrun --nproc-per-node {settings.processes} -m fewbits ...' (accelerate launch --cpu starts one)"
        )
    share = settings.batch_size / accelerator.num_processes / settings.accumulate
    if share != int(share):
        raise ValueError(
            f"batch_size must be a multiple of processes x accumulate, got {settings.batch_size}, "
            f"{accelerator.num_processes} and {settings.accumulate}"
        )
    return accelerator


def memory_format(settings: Settings, student: nn.Module) -> torch.memory_format:
    """How images and kernels lie in memory: as the settings say, else in the faster way where that is free to choose.

    A float32 run without the compiler keeps its bits, and so its format, whatever the default here becomes.
    """
    chosen = settings.channels_last
    if chosen is None:
        has_convolutions = any(isinstance(module, nn.Conv2d) for module in student.modules())
        chosen = has_convolutions and (settings.compile or settings.precision == "bf16")
    return torch.channels_last if chosen else torch.contiguous_format


def remarks(settings: Settings, student: nn.Module, device: torch.device, recipe: Recipe) -> list[str]:
    """What a person should know of the way that a run computes, where the settings did not say it."""
    found = []
    if settings.channels_last is None and memory_format(settings, student) == torch.channels_last:
        found.append(
            "images and kernels are in channels-last, usually the faster way here; --no-channels-last keeps them"
        )
    if settings.precision == "bf16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        found.append("this processor computes bf16 in float32: it may be slower than --precision fp32")
    if settings.shard and (not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1):
        found.append("one process takes part: shard has nothing to split; start several with torchrun")
    is_asked = any(phase.routing != "teacher_input" for phase in recipe.phases())
    if settings.teacher_precision == "bf16" and not (recipe.has_steady_teacher and is_asked):
        found.append(f"recipe {recipe.name!r} asks no frozen teacher for answers: teacher_precision changes nothing")
    missing = native.reason() if device.type == "cpu" else fused.reason(device) if device.type in fused.DEVICES else ""
    if missing:
        found.append(f"quantizers are computed by PyTorch's operators, which is slower: {missing.splitlines()[0]}")
    return found


def make_optimizer(objective: Objective, settings: Settings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW, over all that the objective trains."""
    groups = objective.param_groups(settings.lr, settings.weight_decay, settings.helper_lr)
    for group in groups:
        if "quantizer" in group["name"]:
            group["lr"] *= settings.quantizer_lr
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)


def prepare(objective: Objective, settings: Settings, accelerator: Accelerator, is_shared: bool) -> nn.Module:
    """The objective compiled, and distributed over the processes, as the settings ask; ``is_shared``: FSDP has it."""
    # On a processor to cast again is a pass of its own, which costs a step 9 to 15 % of its time (docs/log.md).
    recompute = settings.recompute and accelerator.device.type != "cpu"
    if is_shared:
        if settings.compile:
            # What gathers weights and shares gradients stays outside of the graph: hooks around the forward pass.
            objective.forward = compiled(objective.forward, recompute=recompute)  # type: ignore[method-assign]
        return objective
    model: nn.Module = compiled(objective, recompute=recompute) if settings.compile else objective
    return model if accelerator.num_processes == 1 else cast(nn.Module, accelerator.prepare(model))


def steps_per_epoch(data: Dataset, settings: Settings) -> int:
    """Whole batches in the training split.

    Raises:
        ValueError: there is not even one.
    """
    steps = data.train.num_samples // settings.batch_size
    if steps == 0:
        raise ValueError(
            f"batch_size is {settings.batch_size}, but {data.name} has {data.train.num_samples} images; lower it"
        )
    return steps
