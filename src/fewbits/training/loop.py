"""The only training loop, on Accelerate: phases of a recipe, steps, evaluations, checkpoints.

Everything that a step depends on is a function of the settings and of the step's number: data order, augmentation,
learning rate, precision, the seed of dropout. So a resumed run takes the steps that an uninterrupted one would have
taken, bit for bit, once networks and optimizer are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Dataset, Normalisation
from ..distill import Networks, Objective
from ..distill.share import gradient_shares
from ..integers import settle_biases
from ..precision import is_fully_quantized, set_precision
from ..recipes import Recipe
from .checkpoint import Checkpoint, load_checkpoint
from .display import Display
from .ema import MovingAverage
from .evaluate import accuracy_over_processes, reestimate_batch_norm
from .feed import Feed
from .folder import RunFolder
from .guard import TrainingError, has_diverged
from .pace import Pace
from .position import Position, read_position
from .profiling import Profile
from .records import Records
from .resume import resume_training, resumed_objective
from .saving import Saver
from .schedules import lr_factor, phase_steps, spread_steps
from .settings import Settings
from .setup import make_accelerator, memory_format, remarks, steps_per_epoch
from .step import Stepper, seed_step
from .teacher_cache import open_cache

LOG_EVERY = 50
"""Most steps between records of the loss; a short epoch has four."""


@dataclass
class Outcome:
    """What a loop leaves behind.

    Args:
        networks: student, teacher and helpers after the last step.
        accuracy: of the student on the test split after the last step, batch norm re-estimated; 0 to 1.
        ema: the averaged student, if one was asked for, and its accuracy.
        position: best accuracy, skipped steps and seconds of the whole run.
        diverged: whether the student ended worse than it began, guessing.
    """

    networks: Networks
    accuracy: float
    ema: nn.Module | None
    ema_accuracy: float | None
    position: Position
    diverged: bool


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
        profile: whether to leave a profile of a few steps in the folder.
        teacher_cache: where a frozen teacher's answers are kept; None asks it again each time.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        recipe: Recipe,
        data: Dataset,
        normalisation: Normalisation,
        settings: Settings,
        folder: RunFolder | None = None,
        shown: bool = True,
        profile: bool = False,
        teacher_cache: Path | None = None,
    ) -> None:
        self.student, self.teacher, self.recipe, self.settings, self.folder = student, teacher, recipe, settings, folder
        self.accelerator = make_accelerator(settings)
        self.is_main = self.accelerator.is_main_process
        self.feed = Feed(data, normalisation, settings, self.accelerator, memory_format(settings, student))
        self.steps_per_epoch = steps_per_epoch(data, settings)
        self.num_steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.phases = recipe.phases()
        self.phase_steps = phase_steps(tuple(phase.share for phase in self.phases), self.num_steps)
        self.position = Position()
        self.ema: MovingAverage | None = None
        self._teacher_cache = teacher_cache
        self._shown = shown and self.is_main
        self._pace = Pace(settings.batch_size)
        self._saver = Saver(folder, self.accelerator, settings.checkpoint_seconds)
        self._profile = Profile(folder.path if folder is not None and profile and self.is_main else None)

    def run(self) -> Outcome:
        """Train to the end, from the folder's checkpoint if it holds one."""
        self.student.to(self.accelerator.device)
        if self.feed.memory_format == torch.channels_last:
            for network in filter(None, (self.student, self.teacher)):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        checkpoint = load_checkpoint(self.folder.checkpoint) if self.folder else None
        if checkpoint is not None:
            self.position = read_position(checkpoint, self.phase_steps)
        first = self.position.phase
        objective = self._begin(first, None) if checkpoint is None else self._resume(checkpoint)
        if self.folder is not None:
            # All processes have looked into the folder before the first one writes there.
            self.accelerator.wait_for_everyone()
            if self.is_main:
                self.folder.begin(self.position.total_step)
        self._display = Display(self.recipe.name, self.num_steps, self.position.total_step, self._shown)
        self._records = Records(
            self.folder if self.is_main else None, self.position, self.steps_per_epoch, self.settings.tensorboard
        )
        with self._display, self._records, self._profile:
            for remark in remarks(self.settings, self.student, self.accelerator.device, self.recipe):
                self._display.say(remark)
            self._saver.start()
            for index in range(first, len(self.phases)):
                if index > first:
                    objective, checkpoint = self._begin(index, objective.networks), None
                try:
                    self._train_phase(objective, checkpoint)
                finally:
                    # Also after an interruption: the networks belong to the caller, who may pass them again.
                    objective.close()
            return self._finish(objective.networks)

    def _begin(self, phase: int, networks: Networks | None) -> Objective:
        """The objective of a phase, begun from real images."""
        # Helpers start at random: after a resume between two phases the next one must draw the same numbers.
        position = self.position
        seed_step(self.settings.seed, position.total_step, 0)
        position.phase, position.step, position.bad_in_a_row = phase, 0, 0
        position.first_loss = position.last_loss = None
        return self.recipe.objective(
            self.student,
            self.teacher,
            batches=self.feed.calibration(),
            phase=phase,
            networks=networks,
            seed=self.settings.seed,
        )

    def _resume(self, checkpoint: Checkpoint) -> Objective:
        example = next(self.feed.calibration())[:2]
        return resumed_objective(
            checkpoint,
            self.recipe,
            self.student,
            self.teacher,
            example,
            self.position,
            self.phase_steps,
            self.settings.seed,
        )

    def _train_phase(self, objective: Objective, checkpoint: Checkpoint | None) -> None:
        settings, position = self.settings, self.position
        stepper = Stepper(objective, settings, self.accelerator, position.bad_in_a_row, position.skipped)
        if settings.ema is not None and position.phase == len(self.phases) - 1:
            self.ema = MovingAverage(objective.networks.student, settings.ema)
        try:
            if checkpoint is not None:
                resume_training(checkpoint, stepper.optimizer, self.ema)
            self._cache = open_cache(self._teacher_cache, objective, self.feed, settings, self._display.say)
            self._take_steps(objective, stepper)
        except BaseException as error:
            if stepper.sharding is None or isinstance(error, TrainingError | ValueError):
                stepper.close()
            # Else the other processes may know of nothing, and shares cannot be put together without them.
            raise
        stepper.close()

    def _take_steps(self, objective: Objective, stepper: Stepper) -> None:
        settings, position, phase = self.settings, self.position, objective.phase
        num_steps = self.phase_steps[position.phase]
        batches = self.feed.training(position.total_step)
        self._pace.resume()
        while position.step < num_steps:
            factor = lr_factor(position.step, num_steps, settings)
            objective.set_progress(position.step / num_steps, position.total_step)
            seed_step(settings.seed, position.total_step, self.accelerator.process_index)
            batch = self._pace.take(batches)
            images, labels, _ = batch
            shares = self._shares(objective, images, labels)
            with self.accelerator.autocast():
                answers = self._cache(batch) if self._cache is not None else ()
            epoch = position.total_step // self.steps_per_epoch
            losses, taken = stepper(images, labels, factor, f"epoch {epoch}, step {position.total_step}", answers)
            if taken:
                position.saw(float(losses["loss"]))
                if self.ema is not None:
                    self.ema.update(objective.networks.student)
            else:
                self._display.say(f"step {position.total_step} skipped: its loss or gradient is not finite")
            position.step += 1
            position.total_step += 1
            position.bad_in_a_row, position.skipped = stepper.guard.in_a_row, stepper.guard.skipped
            self._display.step(phase.name, float(losses["loss"]), self._pace.step())
            self._profile.step()
            if shares:
                self._records.write("shares", phase.name, **shares)
            self._after_step(objective, stepper, losses, factor)
            self._pace.resume()

    def _shares(self, objective: Objective, images: Tensor, labels: Tensor) -> dict[str, float]:
        """What each term contributes to this step's gradient, where it is time to measure it; changes nothing."""
        num_steps = self.phase_steps[self.position.phase]
        if self.position.step not in spread_steps(self.settings.gradient_shares, num_steps):
            return {}
        part = len(images) // self.settings.accumulate
        with self.accelerator.autocast():
            shares = gradient_shares(objective, images[:part], labels[:part])
        return {f"share/{name}": share for name, share in shares.items()}

    def _after_step(self, objective: Objective, stepper: Stepper, losses: dict[str, Tensor], lr_factor: float) -> None:
        """Record, evaluate and save, each when it is time for it."""
        settings, position, phase = self.settings, self.position, objective.phase.name
        is_last = position.step == self.phase_steps[position.phase]
        ends_epoch = position.total_step % self.steps_per_epoch == 0
        if position.step == 1 or position.total_step % min(LOG_EVERY, max(self.steps_per_epoch // 4, 1)) == 0:
            values = {name: float(value) for name, value in losses.items()} | self._pace.report()
            values |= {f"report/{name}": value for name, value in objective.networks.report().items()}
            if self._cache is not None:
                values["pace/kept_answers"] = self._cache.share()
            self._records.write("train", phase, lr=settings.lr * lr_factor, **values)
        evaluates = is_last or (
            ends_epoch and position.total_step // self.steps_per_epoch % settings.evaluate_every == 0
        )
        saves = ends_epoch or is_last or self._saver.is_due()
        if evaluates or saves:
            with stepper.whole():
                if evaluates:
                    self._evaluate(objective, float(losses["loss"]))
                if saves:
                    self._saver.save(position, objective.networks, stepper.optimizer, self.ema)

    def _evaluate(self, objective: Objective, loss: float) -> None:
        """Accuracy, on the way, of the networks that this phase trains."""
        position, phase = self.position, objective.phase
        epoch = position.total_step / self.steps_per_epoch
        num_steps = self.phase_steps[position.phase]
        objective.set_progress(1.0, position.total_step)  # a step's random precision is nobody's result
        for name in dict.fromkeys(group.network for group in phase.trains):
            reached = self._accuracy(objective.networks.network(name))
            self._records.write("evaluation", phase.name, accuracy=reached, network=name)
            self._display.say(f"{phase.name}, epoch {epoch:.2f}: {name} {100 * reached:.2f} %, loss {loss:.3f}")
            if name == "student" and position.phase == len(self.phases) - 1:
                # Earlier phases have other bits: what they reach is not what is shipped.
                position.best_accuracy = max(position.best_accuracy, reached)
        objective.set_progress((position.step - 1) / num_steps, position.total_step - 1)  # what a checkpoint holds
        # Tapped modules ran in it too: what their hooks kept would make torch.compile trace the objective anew.
        objective.forget_features()

    def _accuracy(self, model: nn.Module) -> float:
        return accuracy_over_processes(model, self.feed.test(), self.accelerator)

    def _finish(self, networks: Networks) -> Outcome:
        """Batch norm for the final weights, biases on their grid, the last evaluation."""
        self._saver.count(self.position)
        student, position, num_batches = networks.student, self.position, self.settings.bn_batches
        set_precision(student, self.phases[-1].precision.at(1.0))
        ema = self.ema.network(student) if self.ema is not None else None
        if num_batches and is_fully_quantized(student):
            reestimate_batch_norm(student, self.feed.plain(num_batches))
        end: dict[str, float] = {}
        if ema is not None:
            reestimate_batch_norm(ema, self.feed.plain(max(num_batches, 1)))
            self._settle(ema)
            end["ema_accuracy"] = self._accuracy(ema)
        self._settle(student)
        reached = self._accuracy(student)
        position.best_accuracy = max(position.best_accuracy, reached)
        self._display.say(f"finished: accuracy {100 * reached:.2f} %, best {100 * position.best_accuracy:.2f} %")
        end |= {"accuracy": reached, "best_accuracy": position.best_accuracy}
        diverged = has_diverged(position.first_loss, position.last_loss, reached, self.feed.data.num_classes)
        counts = {"skipped_steps": position.skipped, "seconds": position.seconds, "diverged": diverged}
        self._records.write("end", "student", **end, **counts)
        return Outcome(networks, reached, ema, end.get("ema_accuracy"), position, diverged)

    def _settle(self, network: nn.Module) -> None:
        """What is evaluated, and saved, is then what an integer engine computes."""
        images = next(self.feed.plain(1), None)
        if images is not None:
            settle_biases(network, images)
