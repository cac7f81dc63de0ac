"""Block-wise runs: stopped in either stage, resumed, finished; the structure comes back each time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_worker import SETTINGS, part_of_digits, same_run, stopped_at

from fewbits.blocks import binary_blocks
from fewbits.convert import quantize
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.recipes import BlockWise
from fewbits.training import Result, fit

NUM_STEPS = 12  # two epochs of six


def train(folder: Path, options: dict[str, Any], resume: bool = False) -> Result:
    torch.manual_seed(0)
    teacher = CifarResNet((1, 1), (4, 8), projection=False, num_classes=10, channels=1, architecture="tiny")
    settings: dict[str, Any] = SETTINGS | {"checkpoint_seconds": 0, "optimizer": "adamw", "lr": 0.01}
    return fit(
        quantize(teacher, 1, 1, quantizer="bireal"),
        teacher,
        recipe=BlockWise(**options),
        data=part_of_digits(),
        output=folder,
        resume=resume,
        progress=False,
        **settings,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "prelu"},
        {"branch": "squeeze", "routing": "detached", "stages": "blocks_first"},
        {"branch": "grouped", "routing": "teacher_input", "stages": "one", "distance": "attention"},
        {"beta": 0.0, "branch": "squeeze"},
    ],
    ids=str,
)
def test_stopped_and_resumed_equals_uninterrupted(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train(tmp_path / "whole", options)
    for save in (1, 6, 7, 11):
        folder = tmp_path / f"stopped-{save}"
        with stopped_at(monkeypatch, save, written=save % 2 == 1):
            train(folder, options)
        train(folder, options, resume=True)
        same_run(tmp_path / "whole", folder)
    again = train(tmp_path / "whole", options, resume=True)
    assert len(binary_blocks(again.student)) == 2
    state = whole.student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.student.state_dict().items())
