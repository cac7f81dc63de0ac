"""Where a float network comes from: a run, a file of weights, or the weights that a model is known by."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..data import Dataset, Normalisation
from ..training import read_json
from ..training.folder import RUN
from .runs import load_run

SHOWN = 3
"""Differences between two networks that a message lists."""


@dataclass(frozen=True)
class Source:
    """A float network that exists: the student's start, and the teacher."""

    model: nn.Module
    normalisation: Normalisation | None
    description: str

    def fits(self, student: nn.Module) -> bool:
        """Whether the student is of the same architecture, the classifier's shape apart."""
        return not self.differences(student)

    def differences(self, student: nn.Module) -> list[str]:
        """The tensors that keep the student from starting here, by name, with shapes."""
        mine, theirs = self.model.state_dict(), student.state_dict()
        heads = tuple(f"{head}." for head in models.classifiers(student))
        return [
            *(
                f"{name} is {tuple(mine[name].shape)} in the teacher, {tuple(theirs[name].shape)} in the student"
                for name in mine
                if name in theirs and mine[name].shape != theirs[name].shape and not name.startswith(heads)
            ),
            *(f"the student has no {name}" for name in mine if name not in theirs),
            *(f"the teacher has no {name}" for name in theirs if name not in mine),
        ]


def build(model: str, data: Dataset) -> nn.Module:
    """A network by name, adapted to the data's channels and classes."""
    return models.build(model, num_classes=data.num_classes, channels=data.channels, image_size=data.image_size)


def own_weights(
    model: str, data_name: str, data: Dataset, root: Path | None = None, own_classes: bool = False
) -> Source | None:
    """The network of a model's own weights for this data, or None where there are none.

    Args:
        model: the network's name.
        data_name: as the command was given it.
        data: what is trained on.
        root: the only data folder to look in.
        own_classes: see ``load_teacher``.
    """
    own = models.pretrained(model, data_name, root)
    if own is None:
        return None
    state, normalisation = own
    return Source(_with_weights(model, state, data, own_classes), normalisation, f"pretrained {model}")


def _with_weights(name: str, state: dict[str, Tensor], data: Dataset, own_classes: bool) -> nn.Module:
    """The network of ``state``; its classifier is for the data's classes, or for those that it was trained on."""
    model = build(name, data)
    weight = f"{models.classifiers(model)[0]}.weight"
    if own_classes and weight in state and len(state[weight]) != data.num_classes:
        model = models.build(name, num_classes=len(state[weight]), channels=data.channels, image_size=data.image_size)
    fresh = models.adapt(model, state)
    if fresh:
        _warn_fresh(fresh)
    return model


def load_teacher(path: Path, model: str, data: Dataset, own_classes: bool = False) -> Source:
    """A teacher from a run folder (its own architecture and normalisation) or from a weights file of ``model``.

    Args:
        path: of either.
        model: the network's name, for a weights file.
        data: what is trained on.
        own_classes: keep the classes that the teacher was trained on, as a run folder's always does.

    Raises:
        ValueError: it is not there, damaged, or of another architecture.
    """
    if not path.exists():
        raise ValueError(f"teacher {path} does not exist; give a run folder or a .safetensors, .pt or .th file")
    if path.is_dir():
        run = read_json(path / RUN)
        network, normalisation = load_run(path)
        return Source(network, normalisation, f"run {path.name} ({run.get('model')})")
    state = models.load_weights(path)
    network = _with_weights(model, state, data, own_classes)
    own = models.pretrained(model, data.name)
    # Weights that are the model's own file need the normalisation that they were trained with.
    same = own is not None and all(torch.equal(own[0][n], state[n]) for n in state if n in own[0])
    return Source(network, own[1] if own and same else None, path.name)


def start_from(student: nn.Module, state: dict[str, Tensor]) -> None:
    """Load ``state`` into the student; a classifier of another shape stays as it is, with a warning."""
    fresh = models.adapt(student, state)
    if fresh:
        _warn_fresh(fresh)


def _warn_fresh(names: list[str]) -> None:
    warnings.warn(
        f"the classifier has another shape than the given weights and starts fresh: {', '.join(names)}", stacklevel=3
    )
