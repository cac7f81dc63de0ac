"""The only training loop, on Accelerate: phases of a recipe, steps, evaluations, checkpoints.

Everything that a step depends on is a function of the settings and of the step's number: data order, augmentation,
learning rate, precision, the seed of dropout. So a resumed run takes the steps that an uninterrupted one would have
taken, bit for bit, once networks and optimizer are loaded.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import Dataset, Normalisation
from ..distill import Losses, Networks, Objective, Phase
from ..precision import is_fully_quantized
from ..recipes import Recipe
from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_networks,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
)
from .display import Display
from .ema import MovingAverage
from .evaluate import count_correct, reestimate_batch_norm
from .feed import Feed
from .folder import RunFolder
from .guard import StepBounds, StepGuard
from .schedules import lr_factor, phase_steps
from .settings import Settings
from .setup import make_accelerator, make_optimizer, steps_per_epoch

LOG_EVERY = 50
"""Most steps between records of the loss; a short epoch has four."""


@dataclass
class Outcome:
    """What a loop leaves behind.

    Args:
        networks: student, teacher and helpers after the last step.
        accuracy: of the student on the test split after the last step, batch norm re-estimated; 0 to 1.
        best_accuracy: of all evaluations of the student.
        ema: the averaged student, if one was asked for, and its accuracy.
        skipped_steps: steps with a non-finite loss or gradient.
        seconds: of training, over all sittings.
    """

    networks: Networks
    accuracy: float
    best_accuracy: float
    ema: nn.Module | None
    ema_accuracy: float | None
    skipped_steps: int
    seconds: float


@dataclass
class _Position:
    """Where the run stands; saved with every checkpoint."""

    phase: int = 0
    step: int = 0  # of the phase
    total_step: int = 0  # of the run
    seconds: float = 0.0
    best_accuracy: float = 0.0
    bad_in_a_row: int = 0
    skipped: int = 0


def _position_of(checkpoint: Checkpoint, phase_steps: tuple[int, ...]) -> _Position:
    """The position that a checkpoint holds.

    Raises:
        ValueError: it is none, or none of a run with ``phase_steps``.
    """
    values = checkpoint.values.get("position")
    try:
        position = _Position(**checkpoint.values["position"])
        fits = (
            isinstance(checkpoint.values["optimizer"], dict)
            and position.phase in range(len(phase_steps))
            and position.step in range(phase_steps[position.phase] + 1)
            and position.total_step == sum(phase_steps[: position.phase]) + position.step
        )
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            f"the checkpoint's position {values!r} is none of this run, whose phases have {phase_steps} steps; "
            "delete the checkpoint to start afresh"
        )
    return position


@dataclass
class Loop:
    """One run from its first step to its last.

    Args:
        student: trained in place.
        teacher: the float network, or None.
        recipe: the phases.
        data: train and test split.
        normalisation: of the pixels.
        settings: everything else.
        folder: where checkpoints and metrics go; None keeps nothing.
        shown: whether to show progress.
    """

    student: nn.Module
    teacher: nn.Module | None
    recipe: Recipe
    data: Dataset
    normalisation: Normalisation
    settings: Settings
    folder: RunFolder | None = None
    shown: bool = True
    _position: _Position = field(default_factory=_Position)
    _ema: MovingAverage | None = None
    _started: float = 0.0
    _saved: float = 0.0

    def run(self) -> Outcome:
        """Train to the end, from the folder's checkpoint if it holds one."""
        settings = self.settings
        self._accelerator = make_accelerator(settings)
        self._device = self._accelerator.device
        self._is_main = self._accelerator.is_main_process
        self._steps_per_epoch = steps_per_epoch(self.data, settings)
        self._feed = Feed(self.data, self.normalisation, settings, self._accelerator)
        num_steps = max(1, round(settings.epochs * self._steps_per_epoch))
        phases = self.recipe.phases()
        self._phase_steps = phase_steps(tuple(p.share for p in phases), num_steps)
        self.student.to(self._device)
        if settings.channels_last:
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        checkpoint = load_checkpoint(self.folder.checkpoint) if self.folder else None
        if checkpoint is not None:
            self._position = _position_of(checkpoint, self._phase_steps)
        first = self._position.phase
        objective = self._objective(first, self._networks_before(checkpoint), checkpoint)
        if self.folder is not None:
            # All processes have looked into the folder before the first one writes there.
            self._accelerator.wait_for_everyone()
            if self._is_main:
                self.folder.begin(self._position.total_step)
        self._display = Display(self.recipe.name, num_steps, self._position.total_step, self.shown and self._is_main)
        with self._display, self._tensorboard() as self._events:
            self._started = self._saved = time.monotonic()
            for index in range(first, len(phases)):
                if index > first:
                    objective, checkpoint = self._objective(index, objective.networks, None), None
                try:
                    self._train_phase(objective, phases[index], checkpoint)
                finally:
                    # Also after an interruption: the networks belong to the caller, who may pass them again.
                    objective.close()
            return self._finish(objective.networks)

    def _networks_before(self, checkpoint: Checkpoint | None) -> Networks | None:
        """Replay the structure of the phases that a checkpoint has behind it; None at the very start."""
        if checkpoint is None:
            return None
        example = next(self._feed.calibration())[:2]
        networks: Networks | None = None
        for index, phase in enumerate(self.recipe.phases()[: self._position.phase + 1]):
            networks = self.recipe.begin(self.student, self.teacher, example=example, phase=index, networks=networks)
            if index < self._position.phase:
                Objective(networks, phase).close()  # it makes the phase's helpers, which the checkpoint holds too
        return networks

    def _objective(self, index: int, networks: Networks | None, checkpoint: Checkpoint | None) -> Objective:
        """The objective of a phase: begun from real images, or loaded."""
        phase = self.recipe.phases()[index]
        # Helpers start at random: after a resume between two phases the next one must draw the same numbers.
        torch.manual_seed(_step_seed(self.settings.seed, self._position.total_step, 0))
        if checkpoint is None:
            self._position.phase, self._position.step = index, 0
            return self.recipe.objective(
                self.student, self.teacher, batches=self._feed.calibration(), phase=index, networks=networks
            )
        assert networks is not None
        objective = Objective(networks, phase)
        # The last step's gates come with the checkpoint; the objective has to know of them to change them.
        last = self._position.step - 1
        objective.set_progress(last / self._phase_steps[index], self._position.total_step - 1)
        try:
            load_networks(networks, checkpoint.part("networks"))
        except ValueError:
            objective.close()
            raise
        return objective

    def _train_phase(self, objective: Objective, phase: Phase, checkpoint: Checkpoint | None) -> None:
        settings, position = self.settings, self._position
        num_steps = self._phase_steps[position.phase]
        optimizer = make_optimizer(objective, settings)
        guard = StepGuard(objective.networks, settings.max_bad_steps)
        guard.skipped = position.skipped
        bounds = StepBounds(objective.networks)
        if settings.ema is not None and position.phase == len(self._phase_steps) - 1:
            self._ema = MovingAverage(objective.networks.student, settings.ema)
        if checkpoint is not None:
            load_optimizer_state(optimizer, checkpoint.part("optimizer"), checkpoint.values["optimizer"])
            guard.in_a_row = position.bad_in_a_row
            if self._ema is not None:
                self._ema.averages = {n: t.to(self._device) for n, t in checkpoint.part("ema").items()}
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        model = self._prepared(objective)
        batches = self._feed.training(position.total_step)
        ticks = time.monotonic()
        while position.step < num_steps:
            factor = lr_factor(position.step, num_steps, settings)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            objective.set_progress(position.step / num_steps, position.total_step)
            torch.manual_seed(_step_seed(settings.seed, position.total_step, self._accelerator.process_index))
            guard.remember()
            bounds.remember()
            images, labels = next(batches)
            losses = self._backward(model, images, labels)
            norm = self._accelerator.clip_grad_norm_(objective.parameters(), settings.clip_grad or math.inf)
            epoch = position.total_step // self._steps_per_epoch
            if guard.accept(losses["loss"], cast(Tensor, norm), f"epoch {epoch}, step {position.total_step}"):
                optimizer.step()
                bounds.apply()
                if self._ema is not None:
                    self._ema.update(objective.networks.student)
            else:
                self._display.say(f"step {position.total_step} skipped: its loss or gradient is not finite")
            optimizer.zero_grad()
            position.step += 1
            position.total_step += 1
            position.bad_in_a_row, position.skipped = guard.in_a_row, guard.skipped
            now = time.monotonic()
            self._display.step(phase.name, float(losses["loss"]), settings.batch_size / max(now - ticks, 1e-9))
            ticks = now
            self._after_step(objective, phase, optimizer, losses, position.step == num_steps, factor)
            ticks += time.monotonic() - now

    def _backward(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Gradients of one optimizer step, in micro-batches.

        Returns the loss (``"loss"``) and its terms (``"loss/NAME"``), means over micro-batches and processes.
        """
        parts = self.settings.accumulate
        means: dict[str, Tensor] = {}
        for part, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            last = part == parts - 1
            hold = contextlib.nullcontext() if last else self._accelerator.no_sync(model)
            with hold:
                with self._accelerator.autocast():
                    losses: Losses = model(x, y)
                self._accelerator.backward(losses.total / parts)
            named = {"loss": losses.total.detach(), **{f"loss/{name}": v for name, v in losses.terms.items()}}
            means = {name: means.get(name, 0) + value.float() / parts for name, value in named.items()}
        reduced = cast(Tensor, self._accelerator.reduce(torch.stack(list(means.values())), reduction="mean"))
        return dict(zip(means, reduced.unbind(), strict=True))

    def _after_step(
        self,
        objective: Objective,
        phase: Phase,
        optimizer: torch.optim.Optimizer,
        losses: dict[str, Tensor],
        is_last: bool,
        factor: float,
    ) -> None:
        """Records, evaluation and checkpoint, where it is time for them."""
        settings, position = self.settings, self._position
        ends_epoch = position.total_step % self._steps_per_epoch == 0
        if position.step == 1 or position.total_step % min(LOG_EVERY, max(self._steps_per_epoch // 4, 1)) == 0:
            values = {name: float(value) for name, value in losses.items()}
            self._record("train", phase.name, {"lr": settings.lr * factor, **values})
        epoch = position.total_step // self._steps_per_epoch
        if is_last or (ends_epoch and epoch % settings.evaluate_every == 0):
            reached = self._evaluate(objective.taught)
            # Tapped modules ran in it too: what their hooks kept would make torch.compile trace the objective anew.
            objective.forget_features()
            if objective.taught is objective.networks.student:
                position.best_accuracy = max(position.best_accuracy, reached)
            network = "student" if objective.taught is objective.networks.student else "teacher"
            self._record("evaluation", phase.name, {"accuracy": reached, "network": network})
            self._display.say(
                f"{phase.name}, epoch {position.total_step / self._steps_per_epoch:.2f}: "
                f"accuracy {100 * reached:.2f} %, loss {float(losses['loss']):.3f}"
            )
        if ends_epoch or is_last or time.monotonic() - self._saved >= settings.checkpoint_seconds:
            self._save(objective.networks, optimizer)

    def _evaluate(self, model: nn.Module) -> float:
        """Accuracy on the test split, shared out over the processes."""
        counts = torch.tensor(count_correct(model, self._feed.test()), device=self._device, dtype=torch.float64)
        correct, total = cast(Tensor, self._accelerator.reduce(counts, reduction="sum")).tolist()
        return float(correct / total)

    def _save(self, networks: Networks, optimizer: torch.optim.Optimizer) -> None:
        self._saved = time.monotonic()
        if self.folder is None:
            return
        if self._is_main:
            self._tick()
            tensors, values = optimizer_state(optimizer)
            checkpoint = Checkpoint(values={"position": vars(self._position), "optimizer": values})
            checkpoint.add("networks", networks.state_dict())
            checkpoint.add("optimizer", tensors)
            if self._ema is not None:
                checkpoint.add("ema", self._ema.averages)
            save_checkpoint(self.folder.checkpoint, checkpoint)
        self._accelerator.wait_for_everyone()

    def _finish(self, networks: Networks) -> Outcome:
        """Batch norm for the final weights, the last evaluation."""
        self._tick()
        student = networks.student
        ema = self._ema.network(student) if self._ema is not None else None
        ema_accuracy = None
        if self.settings.bn_batches and is_fully_quantized(student):
            reestimate_batch_norm(student, self._feed.plain(self.settings.bn_batches))
        if ema is not None:
            reestimate_batch_norm(ema, self._feed.plain(max(self.settings.bn_batches, 1)))
            ema_accuracy = self._evaluate(ema)
        reached = self._evaluate(student)
        position = self._position
        position.best_accuracy = max(position.best_accuracy, reached)
        self._display.say(f"finished: accuracy {100 * reached:.2f} %, best {100 * position.best_accuracy:.2f} %")
        end = {
            "accuracy": reached,
            "best_accuracy": position.best_accuracy,
            "skipped_steps": position.skipped,
            "seconds": position.seconds,
        }
        self._record("end", "student", end | ({"ema_accuracy": ema_accuracy} if ema is not None else {}))
        return Outcome(networks, reached, position.best_accuracy, ema, ema_accuracy, position.skipped, position.seconds)

    def _tick(self) -> None:
        now = time.monotonic()
        self._position.seconds += now - self._started
        self._started = now

    def _record(self, event: str, phase: str, values: dict[str, Any]) -> None:
        if self.folder is None or not self._is_main:
            return
        step = self._position.total_step
        epoch = step / self._steps_per_epoch
        self.folder.record({"event": event, "phase": phase, "step": step, "epoch": epoch, **values})
        if self._events is not None:
            numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
            for name, value in numbers.items():
                self._events.add_scalar(f"{phase}/{name}", value, step)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        if self.folder is None or not self._is_main or not self.settings.tensorboard:
            yield None
            return
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self._position.total_step + 1)
        try:
            yield writer
        finally:
            writer.close()

    def _prepared(self, objective: Objective) -> nn.Module:
        model: nn.Module = objective
        if self.settings.compile:
            # Progressive precision compiles once per width; the default limit of 8 is for other uses.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            model = cast(nn.Module, torch.compile(objective, fullgraph=True))
        if self._accelerator.num_processes > 1:
            model = cast(nn.Module, self._accelerator.prepare(model))
        return model


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 1_009 + rank) % 2**63
