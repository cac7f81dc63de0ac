"""``fit``: train a student by a recipe, in memory or in a run folder."""

from __future__ import annotations

import dataclasses
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import check_network
from ..convert import plan_of
from ..data import Dataset, Normalisation
from ..recipes import Recipe
from .checkpoint import load_networks, read_tensors, save_tensors
from .checks import check_channels, check_data, check_outputs, check_recipe
from .folder import METRICS, STUDENT, STUDENT_EMA, RunFolder
from .loop import Loop
from .settings import Settings


@dataclass(frozen=True)
class Result:
    """What training gave.

    Args:
        student: the trained network, in eval mode.
        teacher: the teacher after its own phases, or None.
        accuracy: of the last step on the test split, 0 to 1: the headline.
        best_accuracy: of the best evaluation: only for comparison with tables that select on the test set.
        ema: the averaged student, if asked for.
        ema_accuracy: its accuracy.
        skipped_steps: steps with a non-finite loss or gradient.
        seconds: of training.
        normalisation: that the student's input needs.
        folder: of the run, if there is one.
        diverged: whether the loss ended far above where it began and the student guesses; a warning said so.
    """

    student: nn.Module
    teacher: nn.Module | None
    accuracy: float
    best_accuracy: float
    ema: nn.Module | None
    ema_accuracy: float | None
    skipped_steps: int
    seconds: float
    normalisation: Normalisation
    folder: Path | None
    diverged: bool


def fit(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    recipe: Recipe,
    data: Dataset,
    settings: Settings | None = None,
    normalisation: Normalisation | None = None,
    output: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
    teacher_cache: Path | str | None = None,
    description: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Result:
    """Train ``student`` in place, taught by ``teacher``.

    Args:
        student: from ``quantize``; for recipe float the float network itself.
        teacher: the float network, for recipes that need one.
        recipe: for example ``fewbits.recipes.QFD()``.
        data: train and test split.
        settings: see ``Settings``; single fields may be given as keywords instead (``epochs=3, lr=0.05``).
        normalisation: of the pixels; by default the data set's own. A pretrained network needs the one it was trained
            with.
        output: folder for checkpoints, metrics and the student; None keeps nothing.
        resume: whether to continue the run in ``output``; without one there, it starts afresh.
        progress: whether to show a progress bar.
        profile: whether to leave a profile of a few early steps in ``output``: profile.json.gz for chrome://tracing,
            and the ten most expensive operators in profile.txt.
        teacher_cache: folder where a frozen teacher's answers are kept, so that a picture that comes again, in a later
            epoch or in another run with the same teacher, data and seed, costs no pass of the teacher. The results are
            the same. It says its size before it starts; None keeps nothing.
        description: more entries for ``run.json``.

    Raises:
        TypeError: a network or a recipe that is none, a misspelt setting.
        ValueError: arguments that do not fit together; each message says which and what to do.
        TrainingError: the loss stayed non-finite.
        OSError: a checkpoint could not be written; the previous one is whole.
    """
    check_network("student", student)
    if teacher is not None:
        check_network("teacher", teacher)
    check_recipe(recipe)
    check_data(data)
    recipe = recipe.for_student(student)
    if profile and output is None:
        raise ValueError("profile=True leaves its files in the run folder; pass output=... as well")
    if teacher_cache is not None and not recipe.has_steady_teacher:
        what = "trains its teacher along" if recipe.teacher.needs_teacher else "has no teacher"
        raise ValueError(
            f"teacher_cache is {str(teacher_cache)!r}, but recipe {recipe.name!r} {what}: there are no answers to "
            "keep; leave teacher_cache out"
        )
    settings = dataclasses.replace(settings or Settings(), **overrides)
    normalisation = normalisation or data.normalisation
    check_outputs(student, data)
    check_channels(student, "student", data)
    if teacher is not None:
        check_channels(teacher, "teacher", data)
    # An export that forgot the normalisation would be wrong without a word: it travels with the network.
    student.__dict__["fewbits_normalisation"] = normalisation
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
    folder = None
    if output is not None:
        folder = RunFolder(
            Path(output),
            describe(student, recipe, data, settings, normalisation) | dict(description or {}),
            resume=resume,
        )
        if folder.is_finished:
            return _finished(recipe.restructure(student), folder, normalisation)
    cache = None if teacher_cache is None else Path(teacher_cache)
    loop = Loop(student, teacher, recipe, data, normalisation, settings, folder, progress, profile, cache)
    try:
        outcome = loop.run()
    except BaseException:
        if folder is not None and loop.is_main:
            folder.undo_start()
        raise
    outcome.networks.eval()
    if outcome.diverged and loop.is_main:
        warnings.warn(
            f"the run diverged: its loss rose from {outcome.position.first_loss:.3g} to "
            f"{outcome.position.last_loss:.3g}, and the student guesses ({100 * outcome.accuracy:.2f} %); "
            f"lower --lr, which was {settings.lr:g}",
            stacklevel=2,
        )
    if folder is not None and loop.is_main:
        if outcome.ema is not None:
            save_tensors(folder.path / STUDENT_EMA, outcome.ema.state_dict())
        save_tensors(folder.path / STUDENT, outcome.networks.student.state_dict())
    # Whoever looks into the folder next, in whatever process, finds the student there.
    loop.accelerator.wait_for_everyone()
    return Result(
        student=outcome.networks.student,
        teacher=outcome.networks.teacher,
        accuracy=outcome.accuracy,
        best_accuracy=outcome.position.best_accuracy,
        ema=outcome.ema,
        ema_accuracy=outcome.ema_accuracy,
        skipped_steps=outcome.position.skipped,
        seconds=outcome.position.seconds,
        normalisation=normalisation,
        folder=folder.path if folder else None,
        diverged=outcome.diverged,
    )


def _finished(student: nn.Module, folder: RunFolder, normalisation: Normalisation) -> Result:
    """What a run that is over gave; nothing in its folder changes. Its teacher and average are not loaded."""
    load_networks(student, read_tensors(folder.path / STUDENT)[0])
    end = next((record for record in reversed(folder.metrics()) if record["event"] == "end"), None)
    if end is None:
        raise ValueError(
            f"{folder.path / METRICS} is damaged: the student is there, but no 'end' was recorded; "
            f"delete {STUDENT} and resume to measure it again"
        )
    return Result(
        student=student.eval(),
        teacher=None,
        accuracy=end["accuracy"],
        best_accuracy=end["best_accuracy"],
        ema=None,
        ema_accuracy=end.get("ema_accuracy"),
        skipped_steps=end["skipped_steps"],
        seconds=end["seconds"],
        normalisation=normalisation,
        folder=folder.path,
        diverged=end.get("diverged", False),
    )


def describe(
    student: nn.Module, recipe: Recipe, data: Dataset, settings: Settings, normalisation: Normalisation
) -> dict[str, Any]:
    """Everything that makes a run, for ``run.json``."""
    return {
        "format": 1,
        "network": type(student).__name__,
        "plan": plan_of(student),
        "recipe": recipe,
        "settings": settings,
        "data": {
            "name": data.name,
            "num_train": data.train.num_samples,
            "num_test": data.test.num_samples,
            "classes": data.classes,
            "channels": data.channels,
            "image_size": data.image_size,
            "augment": data.augment,
        },
        "normalisation": normalisation,
        "torch_threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "versions": {
            "fewbits": version("fewbits"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
