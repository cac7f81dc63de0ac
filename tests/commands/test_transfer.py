"""DTQ from the command line: a network trained on some classes moves to others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fewbits.cli import main
from fewbits.commands import load_run, run_data
from fewbits.training.checkpoint import load_checkpoint

SHORT = ["--batch-size", 32, "--lr", "0.01", "--warmup-steps", 2, "--image-size", 16]
SHORT += ["--no-progress", "--no-tensorboard"]
BITS = ["--weights", 4, "--activations", 4]
pytestmark = pytest.mark.filterwarnings("always:the classifier has another shape:UserWarning")


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def write(root: Path, labels: range) -> Path:
    """Digits of these labels as an image folder with train and test."""
    digits = load_digits()
    for label in labels:
        for index, number in enumerate(np.flatnonzero(digits.target == label)[:60]):
            folder = root / ("test" if index % 3 == 0 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[number] * 15).astype(np.uint8)).resize((16, 16)).save(
                folder / f"{index}.png"
            )
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer")
    write(root / "five", range(5)), write(root / "three", range(5, 8))
    assert (
        run("train", "--model", "resnet20", "--data", f"folder:{root / 'five'}", "--recipe", "float", "--epochs", 4,
            "--output", root / "source", *SHORT) == 0
    )  # fmt: skip
    return root


def move(root: Path, name: str, *more: object) -> list[object]:
    return ["train", "--model", "resnet20", "--data", f"folder:{root / 'three'}", "--teacher", root / "source",
            "--output", root / name, "--epochs", 4, "--per-class", 32, *BITS, *SHORT, *more]  # fmt: skip


@pytest.fixture(scope="module")
def moved(place):
    assert run(*move(place, "dtq", "--recipe", "dtq")) == 0
    return place / "dtq"


def test_a_student_with_other_classes(moved):
    described = json.loads((moved / "run.json").read_text())
    assert described["plan"]["quantizer"] == "minmax"  # the recipe's, unless another one is named
    assert described["start"].startswith("run source")
    student, _ = load_run(moved)
    assert student.linear.out_features == 3
    records = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["event"] == "train"]
    assert {"loss/cross_entropy", "loss/alignment", "loss/source_classes", "loss/head_decay"} <= trained[-1].keys()
    assert run_data(moved).train.num_samples == 3 * 32


def test_the_source_classifier_travels_with_the_checkpoint(moved, place):
    networks = load_checkpoint(moved / "checkpoint").part("networks")
    source, _ = load_run(place / "source")
    assert torch.equal(networks["helpers.source_classes.weight"], source.linear.weight)
    assert networks["teacher.linear.weight"].shape == (5, 64)
    assert networks["student.linear.weight"].shape == (3, 64)
    entropies = [float(value) for name, value in networks.items() if name.endswith(".entropy")]
    assert len(entropies) == 3
    assert all(0 < entropy <= 1 for entropy in entropies)
    assert not any("helpers" in name for name in load_run(moved)[0].state_dict())


def test_a_run_that_was_cut_ends_alike(moved, place, monkeypatch):
    """Attention modules, their momentum and the frozen classifier come back from the checkpoint."""
    from fewbits.training.saving import Saver

    save, saved = Saver.save, []

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        saved.append(self)
        if len(saved) == 2:
            raise KeyboardInterrupt

    arguments = move(place, "cut", "--recipe", "dtq")
    monkeypatch.setattr(Saver, "save", save_and_stop)
    assert run(*arguments) == 130
    monkeypatch.undo()
    assert run(*arguments, "--resume") == 0
    assert (place / "cut" / "student.safetensors").read_bytes() == (moved / "student.safetensors").read_bytes()


@pytest.mark.slow
def test_exports_dynamic_and_frozen(moved, capsys):
    pytest.importorskip("onnxruntime")
    assert run("export", moved, "--minimum-equal", 0.5) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "dynamic ranges" in printed
    dynamic = json.loads((moved / "export.json").read_text())
    assert len(dynamic["dynamic"]) == 18  # all layers but the first and the last
    assert not dynamic["frozen_ranges"]
    assert abs(dynamic["accuracy_engine"] - dynamic["accuracy_pytorch"]) <= 0.035  # two of 60 images
    assert run("export", moved, "--freeze-ranges", "--minimum-equal", 0.5) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "minmax-frozen" in printed
    frozen = json.loads((moved / "export-frozen.json").read_text())
    assert frozen["dynamic"] == []
    assert frozen["frozen_ranges"]
    assert [row["name"] for row in frozen["layers"] if row["reason"]] == []
    # Another method under another name: the dynamic file and its report are still there, and both can be checked.
    assert json.loads((moved / "export.json").read_text()) == dynamic
    for name in ("student.onnx", "student-frozen.onnx"):
        assert run("parity", moved, moved / name, "--images", 20) == 0
        assert f"{name} in onnxruntime" in " ".join(capsys.readouterr().out.split())
    assert run("parity", moved, "--images", 20, "--data", f"folder:{moved.parent / 'five'}") == 0
    assert run("parity", moved, "--data", "digits") == 1
    assert "data 'digits' has 1 channels, the run's network takes 3" in " ".join(capsys.readouterr().err.split())
    assert run("bench", moved, "--batch-sizes", 1, "--repeats", 2, "--layers", 0) == 0
    printed = capsys.readouterr().out
    assert "student, frozen" in printed


def test_a_weights_file_keeps_its_classes_as_teacher(place, capsys):
    """Found: the source classifier of a weights file was replaced by a random one for the target's classes."""
    file = place / "source" / "student.safetensors"
    assert run(*move(place, "file", "--recipe", "dtq", "--teacher", file, "--epochs", 0.4)) == 0
    assert "the classifier has another shape than the given weights and starts fresh" in " ".join(
        capsys.readouterr().err.split()
    )
    networks = load_checkpoint(place / "file" / "checkpoint").part("networks")
    source, _ = load_run(place / "source")
    assert torch.equal(networks["teacher.linear.weight"], source.linear.weight)


@pytest.mark.parametrize("recipe", ["l2-sp", "delta", "plain"])
def test_the_rivals(recipe, place):
    assert run(*move(place, recipe, "--recipe", recipe, "--quantizer", "minmax", "--epochs", 0.4)) == 0
    assert json.loads((place / recipe / "run.json").read_text())["plan"]["quantizer"] == "minmax"


def test_options_reach_the_terms(place):
    options = ["--options", "alpha=0.1", 'taps=["layer3.2.conv2"]', "temperature=4"]
    assert run(*move(place, "options", "--recipe", "dtq", "--epochs", 0.4, *options)) == 0
    terms = json.loads((place / "options" / "run.json").read_text())["recipe"]["terms"]
    assert terms[1]["modules"] == ["layer3.2.conv2"]
    assert terms[2]["temperature"] == 4
