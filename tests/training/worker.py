"""What the tests of training share: a tiny network, a part of the digits, and a run that is also a script.

A run in a process of its own (to be killed, or one of several) must do what the same run does in the test's process:
both come from ``train``.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.convert import quantize
from fewbits.data import Dataset, load
from fewbits.recipes import make
from fewbits.training import Result, fit, read_metrics, saving

BATCH_SIZE = 16
NUM_TRAIN = 96  # six batches
NUM_TEST = 50
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": BATCH_SIZE,
    "lr": 0.05,
    "warmup_steps": 2,
    "bn_batches": 2,
    "tensorboard": False,
    "device": "cpu",
}


class Net(nn.Module):
    """Two convolutions, batch norm unless ``norm`` is off, a residual addition, dropout, a classifier."""

    def __init__(self, *, norm: bool = True, dropout: float = 0.0, width: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.dropout(torch.flatten(self.pool(x), 1)))


def network(seed: int = 0, **shape: Any) -> Net:
    """A ``Net`` with the weights of ``seed``."""
    torch.manual_seed(seed)
    return Net(**shape)


def part_of_digits(num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> Dataset:
    """The first training and test images, with the digits' augmentation."""
    data = load("digits")
    train, test = data.train.subset(torch.arange(num_train)), data.test.subset(torch.arange(num_test))
    return replace(data, train=train, test=test)


def train(
    recipe: str = "plain",
    output: Path | str | None = None,
    *,
    resume: bool = False,
    shape: dict[str, Any] | None = None,
    data: Dataset | None = None,
    **settings: Any,
) -> Result:
    """A run from the seed on: equal arguments make equal runs, in whatever process."""
    teacher = network(1, **(shape or {}))
    student = network(0, **(shape or {}))
    method = make(recipe)
    if method.quantized:
        student = quantize(student, weights=3, activations=3)
    return fit(
        student,
        teacher if method.teacher.needs_teacher else None,
        recipe=method,
        data=data or part_of_digits(),
        output=output,
        resume=resume,
        progress=False,
        **SETTINGS | settings,
    )


class Stopped(Exception):
    """What the tests raise in the middle of a run."""


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, save: int, *, written: bool) -> Iterator[None]:
    """Stop the run at its ``save``-th checkpoint (from 1), before or after it is written."""
    original, seen = saving.save_checkpoint, 0

    def save_and_stop(*args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen < save or written:
            original(*args)
        if seen == save:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", save_and_stop)
        with pytest.raises(Stopped):
            yield


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    """Without what says how long it took, or how fast it went."""
    return {k: v for k, v in values.items() if k.rpartition("/")[2] != "seconds" and "pace/" not in k}


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without how long it took."""
    return [timeless(record) for record in read_metrics(folder)]


def same_run(one: Path, two: Path) -> None:
    assert records(one) == records(two)
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in two.glob("*.safetensors"))
    assert "student.safetensors" in names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def hold_write(number: int) -> None:
    """Let the ``number``-th write of a checkpoint hang with its file half there, for the test to kill it."""
    fsync, seen = os.fsync, 0

    def held(handle: int) -> None:
        nonlocal seen
        name = os.readlink(f"/proc/self/fd/{handle}")
        seen += "state.safetensors" in name
        if seen == number:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            Path(name).parent.joinpath("held").touch()
            time.sleep(600)
        fsync(handle)

    os.fsync = held


def slow_save() -> None:
    """Let the first process take its time to write the student."""
    module = importlib.import_module("fewbits.training.fit")  # the function hides its module
    save = module.save_tensors

    def slowly(*args: Any) -> None:
        time.sleep(1.0)
        save(*args)

    module.save_tensors = slowly


def watch_shares() -> list[float]:
    """Of each sharded phase, the share of the parameters that this process held."""
    module, seen = importlib.import_module("fewbits.training.sharding"), []
    undo = module.Sharding.undo

    def look(sharding: Any) -> None:
        sharding._unit.reshard()
        held = [parameter for parameter in sharding._objective.parameters() if module.is_share(parameter)]
        seen.append(sum(p.to_local().numel() for p in held) / sum(p.numel() for p in held))
        undo(sharding)

    module.Sharding.undo = look
    return seen


def stop_after(number: int) -> None:
    """Let the run fail, in all processes, at the checkpoint behind its ``number``-th."""
    take, seen = saving.take_checkpoint, 0

    def stop(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > number:
            saving.take_checkpoint = take
            raise Stopped
        return take(*args)

    saving.take_checkpoint = stop


def main(argument: str) -> int:
    """Run what a JSON list of objects says, one after the other; print for each what it gave, or its error."""
    torch.set_num_threads(1)
    shares = watch_shares()
    for config in json.loads(argument):
        shares.clear()
        if "hold_write" in config:
            hold_write(config.pop("hold_write"))
        if config.pop("slow_save", False):
            slow_save()
        if "stop_after" in config:
            stop_after(config.pop("stop_after"))
        data = part_of_digits(config.pop("num_train", NUM_TRAIN), config.pop("num_test", NUM_TEST))
        try:
            result = train(data=data, **config)
            outcome: dict[str, Any] = {"accuracy": result.accuracy, "shares": list(shares)}
            pickle.dumps(result.student)  # nothing that trained it holds on to it
        except Stopped:
            outcome = {"stopped": True}
        except (ValueError, OSError, RuntimeError) as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps({"rank": int(os.environ.get("RANK", 0)), **outcome}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
