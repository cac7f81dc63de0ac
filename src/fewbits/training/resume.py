"""What a checkpoint holds of the networks at work, and how a run goes on from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distill import Networks, Objective
from ..recipes import Recipe
from .checkpoint import Checkpoint, load_networks, load_optimizer_state, optimizer_state
from .ema import MovingAverage
from .position import Position
from .sharding import gathered, scatter_state


def take_checkpoint(
    position: Position, networks: Networks, optimizer: torch.optim.Optimizer, ema: MovingAverage | None
) -> Checkpoint:
    """Everything that the next step depends on, beside the settings; networks in shares need all processes for it."""
    tensors, values = optimizer_state(optimizer)
    checkpoint = Checkpoint(values={"position": dict(vars(position)), "optimizer": values})
    checkpoint.add("networks", gathered(networks.state_dict()))
    checkpoint.add("optimizer", gathered(tensors))
    if ema is not None:
        checkpoint.add("ema", ema.averages)
    return checkpoint


def resumed_objective(
    checkpoint: Checkpoint,
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module | None,
    example: Tensor,
    position: Position,
    phase_steps: tuple[int, ...],
    seed: int = 0,
) -> Objective:
    """The objective that a checkpoint was taken of: all edits so far are replayed, then all values loaded.

    Args:
        checkpoint: of the same run.
        recipe, student, teacher: as the run began with them.
        example: a few images, N x C x H x W, that give helpers their shapes.
        position: of the checkpoint.
        phase_steps: optimizer steps of each phase.
        seed: of what a schedule draws.

    Raises:
        ValueError: the checkpoint belongs to other networks.
    """
    phases = recipe.phases()
    networks = recipe.begin(student, teacher, example=example, phase=0, networks=None)
    for index in range(position.phase):
        Objective(networks, phases[index]).close()  # it makes the phase's helpers, which the checkpoint holds too
        networks = recipe.begin(student, teacher, example=example, phase=index + 1, networks=networks)
    objective = Objective(networks, phases[position.phase], seed)
    # The last step's gates come with the checkpoint; the objective has to know of them to change them.
    objective.set_progress((position.step - 1) / phase_steps[position.phase], position.total_step - 1)
    try:
        load_networks(networks, checkpoint.part("networks"))
    except ValueError:
        objective.close()
        raise
    return objective


def resume_training(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, ema: MovingAverage | None) -> None:
    """Put back what the optimizer and the average had gathered."""
    load_optimizer_state(optimizer, checkpoint.part("optimizer"), checkpoint.values["optimizer"])
    scatter_state(optimizer)
    if ema is not None:
        ema.averages = {name: t.to(ema.averages[name].device) for name, t in checkpoint.part("ema").items()}
