"""One optimizer step of a phase: its gradients, whether they may be taken, and the numbers that its dropout draws."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..distill import Losses, Objective
from ..quantizers.again import QuantizingAgain
from ..quantizers.gates import promised_open
from .activations import CheckpointedBlocks
from .bounds import bound_steps
from .guard import StepGuard
from .rectifiers import find, rectified_by_quantizers
from .settings import Settings
from .setup import make_optimizer, prepare
from .sharding import Sharding, is_share, squared_norm
from .weights import SharedWeights


class Stepper:
    """Everything that a phase's steps share: the objective as it runs, the optimizer, the guard.

    Args:
        objective: of the phase.
        settings: rate, optimizer, micro-batches, clipping.
        accelerator: precision and processes.
        in_a_row, skipped: bad steps just now and in all, of the sitting before.
    """

    def __init__(
        self,
        objective: Objective,
        settings: Settings,
        accelerator: Accelerator,
        in_a_row: int = 0,
        skipped: int = 0,
    ) -> None:
        # A compiled graph fuses them by itself; on other devices nobody has the pass.
        is_eager = accelerator.device.type == "cpu" and not settings.compile
        self._rectifiers = find(objective.networks.student) if is_eager else ()
        self.blocks = CheckpointedBlocks(objective) if settings.checkpoint_blocks else None
        is_shared = settings.shard and accelerator.num_processes > 1
        self.sharding = Sharding(objective, accelerator.device) if is_shared else None
        self.optimizer = make_optimizer(objective, settings)
        self.guard = StepGuard(objective.networks, settings.max_bad_steps, in_a_row, skipped)
        bound_steps(self.optimizer, objective)
        self._objective, self._settings, self._accelerator = objective, settings, accelerator
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        objective.teacher_dtype = torch.bfloat16 if settings.teacher_precision == "bf16" else None
        self._model = prepare(objective, settings, accelerator, is_shared)

    def whole(self) -> AbstractContextManager[None]:
        """A context in which networks have their weights whole, to evaluate or save them; see ``Sharding.whole``."""
        return nullcontext() if self.sharding is None else self.sharding.whole()

    def close(self) -> None:
        """The phase is over, by its end or by an error of all processes: networks are as they came but for values."""
        if self.blocks is not None:
            self.blocks.undo()
        if self.sharding is not None:
            self.sharding.undo()

    def _are_gates_open(self) -> bool:
        """Whether a compiled graph may rely on it; asked where that waits for no device."""
        is_cheap = self._settings.compile and self._accelerator.device.type == "cpu"
        return is_cheap and self._objective.is_fully_quantized

    def __call__(
        self, images: Tensor, labels: Tensor, lr_factor: float, where: str, answers: tuple[Tensor, ...] = ()
    ) -> tuple[dict[str, Tensor], bool]:
        """Take one step, unless its loss or gradient is not finite.

        Args:
            images: of this process, N x C x H x W.
            labels: N.
            lr_factor: the schedule's, on every group's rate.
            where: epoch and step, for messages.
            answers: of the teacher, where they are known; see ``Objective.teach``.

        Returns:
            The losses, see ``backward``; and whether the step was taken.

        Raises:
            TrainingError: too many bad steps in a row.
        """
        settings, optimizer = self._settings, self.optimizer
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        self.guard.remember()
        batch = (images, labels, *answers)
        # A compiled graph decides for itself what it keeps, and frees it piece by piece: nobody else may hold it.
        again = settings.recompute and not settings.compile
        with promised_open(self._objective, self._are_gates_open()), rectified_by_quantizers(self._rectifiers):
            given = (self._accelerator, self._model, batch, settings.accumulate, self.sharding)
            losses = backward(*given, recompute=again)
        if self.blocks is not None:
            self.blocks.forget()
        norm = clip_gradients(self._accelerator, self._objective, settings.clip_grad)
        taken = self.guard.accept(losses["loss"], norm, where)
        if taken:
            optimizer.step()
        optimizer.zero_grad()
        return losses, taken


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: tuple[Tensor, ...],
    num_parts: int,
    sharding: Sharding | None = None,
    *,
    recompute: bool = True,
) -> dict[str, Tensor]:
    """Gradients of one step, in micro-batches.

    Args:
        accelerator: precision and processes.
        model: the objective, prepared.
        batch: images of this process, N x C x H x W, their labels, N, and the teacher's answers, if they are known.
        num_parts: micro-batches; it divides N.
        sharding: of the objective, if it is in shares.
        recompute: quantize again in the backward pass instead of keeping what was quantized.

    Returns:
        The loss (``"loss"``) and its terms (``"loss/NAME"``), means over micro-batches and processes.

    Raises:
        ValueError: the micro-batches would differ in size.
    """
    if len(batch[0]) % num_parts:
        raise ValueError(f"num_parts must divide the batch, got {num_parts} and {len(batch[0])} images")
    means: dict[str, Tensor] = {}
    parts = zip(*(whole.chunk(num_parts) for whole in batch), strict=True)
    # Where weights are in shares they are whole inside the model alone: each micro-batch quantizes them there.
    with SharedWeights(model, 1 if sharding else num_parts) as weights:
        for part, (images, labels, *answers) in enumerate(parts):
            is_last = part == num_parts - 1
            if is_last:
                weights.last()
            if sharding is not None:
                sharding.synchronise(is_last)
            with nullcontext() if is_last else accelerator.no_sync(model):
                with accelerator.autocast(), QuantizingAgain() if recompute else nullcontext():
                    losses: Losses = model(images, labels, tuple(answers))
                accelerator.backward(losses.total / num_parts)
            named = {"loss": losses.total.detach(), **{f"loss/{name}": v for name, v in losses.terms.items()}}
            means = {name: means.get(name, 0) + value.float() / num_parts for name, value in named.items()}
        weights.finish()
    if sharding is not None:
        sharding.reduce()
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
    norms = [_clip_group(accelerator, group, most or math.inf) for group in groups]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _clip_group(accelerator: Accelerator, group: list[nn.Parameter], most: float) -> Tensor:
    if not any(map(is_share, group)):
        return cast(Tensor, accelerator.clip_grad_norm_(group, most))
    grads = [parameter.grad for parameter in group if parameter.grad is not None]
    norm = squared_norm(grads).sqrt()
    for grad in grads if math.isfinite(most) else []:
        grad.mul_(float((most / (norm + 1e-6)).clamp(max=1.0)))
    return norm


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a step draws, dropout's masks say: nothing is left to restore on resume."""
    torch.manual_seed((seed * 1_000_003 + step * 1_009 + rank) % 2**63)
