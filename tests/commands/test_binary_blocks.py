"""Double shortcuts from the command line: every recipe trains them from the plain network's weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fewbits.blocks import binary_blocks
from fewbits.cli import main
from fewbits.commands import load_run

SHORT = ["--batch-size", "32", "--warmup-steps", "5", "--per-class", "60", "--no-progress", "--no-tensorboard"]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "float"
    assert (
        run(
            "train",
            "--model",
            "resnet20",
            "--data",
            "digits",
            "--recipe",
            "float",
            "--output",
            folder,
            *SHORT,
            "--epochs",
            1,
            "--lr",
            0.1,
        )
        == 0
    )
    return folder


def binary(teacher: Path, folder: Path, *more: object) -> list[object]:
    bits = ["--weights", 1, "--activations", 1, "--teacher", teacher, "--output", folder, "--lr", 0.002]
    return [
        "train",
        "--model",
        "resnet20",
        "--data",
        "digits",
        *bits,
        "--optimizer",
        "adamw",
        "--epochs",
        0.5,
        *SHORT,
        *more,
    ]


@pytest.mark.parametrize("recipe", ["plain", "logits", "features", "joint", "two-stage"])
def test_every_recipe_trains_double_shortcuts(recipe: str, teacher: Path, tmp_path: Path):
    blocks = ["--blocks", "bireal+prelu+squeeze", "--quantizer", "bireal"]
    assert run(*binary(teacher, tmp_path / "run", "--recipe", recipe, *blocks)) == 0
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["blocks"] == "bireal+prelu+squeeze"
    assert described["start"].startswith("run float")
    student, _ = load_run(tmp_path / "run")
    assert len(binary_blocks(student)) == 9
    assert torch.isfinite(student(torch.zeros(2, 1, 8, 8))).all()


def test_they_start_from_the_plain_weights(teacher: Path, tmp_path: Path):
    assert run(*binary(teacher, tmp_path / "run", "--blocks", "bireal", "--lr", "1e-9")) == 0
    own, taught_by = load_run(tmp_path / "run")[0].state_dict(), load_run(teacher)[0]
    for name, parameter in taught_by.named_parameters():
        torch.testing.assert_close(own[name], parameter.detach(), atol=1e-5, rtol=0)


def test_a_teacher_with_double_shortcuts(teacher: Path, tmp_path: Path):
    """The float network of the same topology; the student starts from it."""
    options = ["--recipe", "float", "--blocks", "bireal+prelu", "--output", tmp_path / "float", *SHORT]
    assert run("train", "--model", "resnet20", "--data", "digits", "--epochs", 0.5, *options) == 0
    taught_by, _ = load_run(tmp_path / "float")
    assert isinstance(binary_blocks(taught_by)[0].act1, nn.PReLU)
    more = ["--recipe", "blockwise", "--blocks", "bireal+prelu", "--options", "routing=teacher_input"]
    assert run(*binary(tmp_path / "float", tmp_path / "run", *more)) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["start"] == "run float (resnet20)"


@pytest.mark.slow
def test_blockwise_is_trained_exported_measured_and_resumed(teacher: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "run"
    command = binary(teacher, folder, "--recipe", "blockwise", "--options", "branch=bottleneck", "activation=prelu")
    assert run(*command) == 0
    described = json.loads((folder / "run.json").read_text())
    assert described["plan"]["quantizer"] == "bireal"
    student, _ = load_run(folder)
    assert all(block.branch1 is not None for block in binary_blocks(student))
    before = (folder / "student.safetensors").read_bytes()
    assert run(*command, "--resume") == 0
    assert (folder / "student.safetensors").read_bytes() == before
    assert run("export", folder) == 0
    assert run("bench", folder, "--repeats", 2, "--batch-sizes", 1) == 0
    assert run("summary", "--run", folder) == 0
    rows = {row["name"]: row for row in json.loads((folder / "summary.json").read_text())["rows"]}
    assert rows["layer1.0.branch1.squeeze"]["weight"] is None
    assert rows["layer1.0.conv1"]["weight"]["bits"] == 1


def test_wrong_blocks(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for text in ("birael", "bireal+relu", "bireal+squeeze+grouped", "prelu"):
        assert run(*binary(teacher, tmp_path / "run", "--blocks", text)) == 1
        assert "blocks must be none or bireal, with +prelu, +int8 and one of" in " ".join(
            capsys.readouterr().err.split()
        )
    assert run(*binary(teacher, tmp_path / "run", "--recipe", "blockwise", "--quantizer", "lsq", "--residual", 8)) == 1
    assert "residual=None (--residual none" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "student.safetensors").exists()
