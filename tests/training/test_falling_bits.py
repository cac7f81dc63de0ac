"""Falling bits in a run: widths that the student has already are no phases, also after a resume."""

from pathlib import Path

import pytest
import torch
from training_worker import SETTINGS, part_of_digits, same_run, stopped_at

from fewbits.convert import quantize
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.recipes import Progressive
from fewbits.training import fit, read_metrics


def train(folder: Path, resume: bool = False) -> None:
    torch.manual_seed(0)
    network = CifarResNet((1, 1), (4, 8), projection=False, num_classes=10, channels=1, architecture="tiny")
    with pytest.warns(UserWarning, match="bits 4 are not above the student's"):
        fit(
            quantize(network, 4, 4),
            recipe=Progressive(),
            data=part_of_digits(),
            output=folder,
            resume=resume,
            progress=False,
            **SETTINGS | {"checkpoint_seconds": 0},
        )


def test_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(tmp_path / "whole")
    phases = dict.fromkeys(record["phase"] for record in read_metrics(tmp_path / "whole"))
    assert list(phases) == ["8 bits", "student"]
    for save in (4, 8):
        with stopped_at(monkeypatch, save, written=True):
            train(tmp_path / f"stopped-{save}")
        train(tmp_path / f"stopped-{save}", resume=True)
        same_run(tmp_path / "whole", tmp_path / f"stopped-{save}")
