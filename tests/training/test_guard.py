"""Steps that went wrong: skipped, counted, undone, and the end of the run when they persist."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_worker import BATCH_SIZE, NUM_TRAIN, network, part_of_digits, same_run, stopped_at, train

from fewbits.data import Dataset, TensorSplit
from fewbits.data.split import plan_batches
from fewbits.training import TrainingError, read_metrics
from fewbits.training import loop as loop_module
from fewbits.training import step as step_module
from fewbits.training.guard import StepGuard, has_diverged


def poisoned(*steps: int, epochs: int = 2) -> Dataset:
    """The digits as real float tensors, with one pixel of NaN in each of these steps' batches.

    An image of the second epoch was in the first one too: in step 1's batch, by choice. None is in calibration's.
    """
    data = part_of_digits()
    assert isinstance(data.train, TensorSplit)
    split = TensorSplit(data.train.images.float() / 255, data.train.labels)
    *order, calibration = [
        plan_batches(NUM_TRAIN, batch_size=BATCH_SIZE, shuffle=True, seed=0, epoch=epoch) for epoch in range(epochs + 1)
    ]
    spared = set(torch.cat(list(calibration[:2])).tolist())
    for step in steps:
        epoch, batch = divmod(step, len(order[0]))
        chosen = set(order[epoch][batch].tolist()) - spared
        split.images[min(chosen & set(order[0][1].tolist()) if epoch else chosen), 0, 4, 4] = torch.nan
    return replace(data, train=split)  # made of whole images: a split refuses NaN


class Spy:
    """Looks at the student before and behind each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[dict[str, Tensor]] = []
        original = loop_module.Loop._after_step

        def after_step(loop: Any, objective: Any, *args: Any) -> None:
            self.states.append({n: t.clone() for n, t in objective.networks.student.state_dict().items()})
            original(loop, objective, *args)

        monkeypatch.setattr(loop_module.Loop, "_after_step", after_step)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_step_with_nan_leaves_no_trace(optimizer: str, accumulate: int, monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    data = poisoned(3, epochs=1)
    result = train("plain", data=data, epochs=1, bn_batches=0, optimizer=optimizer, lr=0.01, accumulate=accumulate)
    assert result.skipped_steps == 1
    before, behind = spy.states[2], spy.states[3]
    for name, value in before.items():
        assert torch.equal(value, behind[name]), name  # batch norm's counter of batches included
    assert not torch.equal(spy.states[4]["conv1.weight"], behind["conv1.weight"])
    assert all(bool(torch.isfinite(value.float()).all()) for value in result.student.state_dict().values())


def test_an_infinite_gradient_is_skipped_too(monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    original = step_module.backward

    def backward(accelerator: Any, model: nn.Module, *batch: Any, **ways: Any) -> Any:
        given = original(accelerator, model, *batch, **ways)
        if len(spy.states) == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.flatten()[0] = torch.inf
        return given

    monkeypatch.setattr(step_module, "backward", backward)
    result = train("plain", epochs=1, ema=0.9)
    assert result.skipped_steps == 1
    assert all(torch.equal(spy.states[1][name], value) for name, value in spy.states[2].items())


def test_batch_norm_is_not_estimated_anew_from_a_poisoned_image():
    """The image that the guard kept out of training came in again at the end."""
    data = poisoned(3, epochs=1)
    result = train("plain", data=data, epochs=1, bn_batches=6, ema=0.9)
    for model in (result.student, result.ema):
        assert model is not None
        assert all(bool(torch.isfinite(value.float()).all()) for value in model.state_dict().values())


def test_skipped_steps_are_recorded_as_strict_json(tmp_path: Path):
    """A NaN is no JSON: a browser that reads the metrics stops there."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    # The first step is always recorded.
    result = train("plain", tmp_path, data=poisoned(0, epochs=1), epochs=1)
    assert result.skipped_steps == 1
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_bad_steps_in_a_row_end_the_run_with_epoch_and_step(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"3 steps in a row .*\(nan\).* epoch 1, step 9; look for NaN in the data"):
        train("plain", tmp_path, data=poisoned(7, 8, 9), max_bad_steps=3, checkpoint_seconds=0)
    assert not (tmp_path / "student.safetensors").exists()
    assert (tmp_path / "checkpoint/state.safetensors").exists()


def test_a_resumed_run_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"data": poisoned(7, 8, 9), "max_bad_steps": 3, "checkpoint_seconds": 0}
    with stopped_at(monkeypatch, 9, written=True):  # steps 7 and 8 are behind it
        train("plain", tmp_path, **settings)
    with pytest.raises(TrainingError, match=r"3 steps in a row .* step 9"):
        train("plain", tmp_path, **settings, resume=True)


def test_skipped_steps_of_both_phases_and_sittings_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"data": poisoned(1, 7), "checkpoint_seconds": 0}
    whole = train("qfd", tmp_path / "whole", **settings)
    assert whole.skipped_steps >= 3  # step 1's image stays poisoned in the second epoch
    with stopped_at(monkeypatch, 4, written=True):
        train("qfd", tmp_path / "stopped", **settings)
    again = train("qfd", tmp_path / "stopped", **settings, resume=True)
    assert again.skipped_steps == whole.skipped_steps
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_good_step_ends_the_row():
    guard = StepGuard(network(), 3)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    assert [guard.accept(loss, good, "") for loss in (bad, bad, good, bad, bad)] == [False, False, True, False, False]
    assert (guard.in_a_row, guard.skipped) == (2, 4)
    with pytest.raises(TrainingError):
        guard.accept(bad, good, "")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_all_buffers_come_back(momentum: float | None):
    """With momentum None the counter of batches is part of the average."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=momentum))
    model(torch.randn(4, 1, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guard = StepGuard(model, 10)
    guard.remember()
    loss = model(torch.full((4, 1, 8, 8), torch.nan)).sum()
    assert not guard.accept(loss, torch.tensor(1.0), "")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_that_diverged_says_so(tmp_path: Path):
    """Finite all the way: such a run ended without a word, its student a constant classifier."""
    with pytest.warns(UserWarning, match=r"the run diverged: its loss rose from .* and the student guesses .*--lr"):
        result = train("plain", tmp_path, lr=100.0)
    assert result.diverged
    assert result.skipped_steps == 0
    assert read_metrics(tmp_path)[-1]["diverged"] is True
    assert train("plain", tmp_path, lr=100.0, resume=True).diverged
    assert not train("plain").diverged


@pytest.mark.parametrize(
    ("losses", "accuracy", "num_classes", "expected"),
    [
        ((0.2, 1.0), 0.1, 10, False),  # up, but less than guessing costs
        ((0.2, 5.0), 0.1, 10, True),
        ((300.0, 500.0), 0.1, 10, False),  # features cost hundreds from the start
        ((300.0, 700.0), 0.1, 10, True),
        ((0.2, 50.0), 0.7, 10, False),  # a term that grew
        ((0.2, 50.0), 0.5, 2, True),
        ((None, None), 0.1, 10, False),
    ],
)
def test_what_counts_as_diverged(losses: Any, accuracy: float, num_classes: int, expected: bool):
    assert has_diverged(*losses, accuracy, num_classes) is expected
