"""``fewbits pack``: from a run folder to one file that builds its network by itself."""

from pathlib import Path

import pytest
import torch

import fewbits as fb
from fewbits.cli import main
from fewbits.commands import load_run
from fewbits.deploy.packed import read_header

SHORT = ["--data", "digits", "--epochs", "1", "--batch-size", "32", "--per-class", "20", "--lr", "0.01"]
SHORT += ["--no-progress", "--no-tensorboard", "--warmup-steps", "1"]
ONE = ["--weights", 1, "--activations", 1]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "float"
    assert run("train", "--model", "resnet20", "--recipe", "float", "--output", folder, *SHORT) == 0
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["--weights", 2, "--activations", 4, "--recipe", "features", "--granularity", "channel"],
        [*ONE, "--recipe", "plain", "--blocks", "bireal+prelu+squeeze", "--quantizer", "react"],
        [*ONE, "--recipe", "blockwise"],  # rewrites the blocks and adds branches while it trains
        ["--weights", 3, "--activations", 3, "--recipe", "dtq"],
    ],
    ids=["features", "bireal", "blockwise", "dtq"],
)
def test_a_run_packs_and_loads_by_itself(options, teacher, tmp_path, capsys):
    folder = tmp_path / "student"
    assert run("train", "--model", "resnet20", "--teacher", teacher, "--output", folder, *SHORT, *options) == 0
    assert run("pack", folder) == 0
    path = folder / "student-packed.safetensors"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{path}: {path.stat().st_size:,} bytes, float" in printed
    student, normalisation = load_run(folder)
    loaded = fb.load_packed(path)
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
    assert loaded.__dict__["fewbits_normalisation"] == normalisation
    header = read_header(path)
    assert header["data"]["classes"] == [str(digit) for digit in range(10)]
    assert header["fewbits"]


def test_what_cannot_be_packed(teacher, tmp_path, capsys):
    assert run("pack", teacher) == 1
    assert "has no quantized weight, so there is nothing to pack" in " ".join(capsys.readouterr().err.split())
    assert run("pack", tmp_path) == 1
    assert "is no run folder" in " ".join(capsys.readouterr().err.split())
    assert not (teacher / "student-packed.safetensors").exists()
