"""What ``fit`` promises and refuses, before any training where it can."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_worker import SETTINGS, network, part_of_digits, same_run, stopped_at, timeless, train

from fewbits.convert import quantize
from fewbits.data import Dataset, Normalisation, TensorSplit
from fewbits.quantizers import fused
from fewbits.recipes import Plain, make
from fewbits.training import Settings, fit, read_metrics
from fewbits.training import loop as loop_module
from fewbits.training.setup import memory_format, remarks


def never(*args: Any) -> None:
    raise AssertionError("trained before the error")


def try_to_fit(student: nn.Module, teacher: nn.Module | None, recipe: str, folder: Path, **other: Any) -> None:
    fit(student, teacher, recipe=make(recipe), output=folder, progress=False, **{"data": part_of_digits(), **other})


@pytest.mark.parametrize(
    ("recipe", "teacher", "message"),
    [
        ("qfd", None, "recipe 'qfd' needs a teacher; pass teacher="),
        ("logits", {"classes": 12}, r"different logits: \(10,\) and \(12,\) per image; use a teacher of the same kind"),
        ("features", {"width": 8}, r"different features: \(24,\) and \(32,\) per image"),
    ],
)
def test_networks_that_do_not_fit(recipe: str, teacher: Any, message: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(loop_module.Loop, "_train_phase", never)
    student = quantize(network(), weights=3, activations=3)
    other = None if teacher is None else network(1, **teacher)
    with pytest.raises(ValueError, match=message):
        try_to_fit(student, other, recipe, tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()
    assert all(p.requires_grad for network in (student, other) if network for p in network.parameters())


def test_the_teacher_is_not_the_student(tmp_path: Path):
    student = quantize(network(), weights=3, activations=3)
    with pytest.raises(ValueError, match="teacher and student are the same object"):
        try_to_fit(student, student, "logits", tmp_path / "run", **SETTINGS)


def test_a_student_with_too_few_outputs(tmp_path: Path):
    student = quantize(network(classes=9), weights=3, activations=3)
    with pytest.raises(ValueError, match="has 9 outputs, but digits has 10 classes; build it with num_classes=10"):
        try_to_fit(student, None, "plain", tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "hint"),
    [
        ("plain", r"got 'plain'; pass recipe=fewbits\.recipes\.make\('plain'\)"),
        (Plain, r"call it: recipe=Plain\(\)"),
        (None, r"got None; make one with fewbits\.recipes\.make\(NAME\), NAME one of float, plain"),
    ],
)
def test_a_recipe_that_is_none(recipe: Any, hint: str, tmp_path: Path):
    with pytest.raises(TypeError, match=f"recipe must be a fewbits.Recipe, .*{hint}"):
        fit(network(), recipe=recipe, data=part_of_digits(), output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["resnet20", nn.Linear, None])
def test_a_network_that_is_none(given: Any):
    with pytest.raises(TypeError, match=r"student must be a network, a torch\.nn\.Module, got"):
        fit(given, recipe=make("float"), data=part_of_digits(), progress=False)
    if given is not None:
        with pytest.raises(TypeError, match="teacher must be a network"):
            fit(network(), given, recipe=make("float"), data=part_of_digits(), progress=False)


def test_data_that_is_none():
    loader: Any = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(TypeError, match=r"data must be a fewbits\.data\.Dataset, got list; use fewbits\.data\.load"):
        fit(network(), recipe=make("float"), data=loader, progress=False)


def coloured(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, classes))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_images_of_other_channels(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_module.Loop, "run", never)
    student = quantize(coloured() if who == "student" else network(), weights=3, activations=3)
    teacher = coloured() if who == "teacher" else network()
    with pytest.raises(
        ValueError, match=f"the {who}'s first convolution takes 3 channels, but .* digits have 1; build"
    ):
        try_to_fit(student, teacher, "logits", tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()
    assert student.training


class Colour(nn.Module):
    """Grey to colour, inside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = coloured()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.expand(-1, 3, -1, -1))


def test_a_network_may_turn_grey_into_colour_itself():
    student = quantize(Colour(), weights=3, activations=3)
    result = fit(student, recipe=make("plain"), data=part_of_digits(), progress=False, **{**SETTINGS, "epochs": 1})
    assert result.skipped_steps == 0


def test_a_student_of_the_wrong_kind(tmp_path: Path):
    with pytest.raises(ValueError, match=r"trains a quantized student; call fewbits\.quantize"):
        try_to_fit(network(), None, "plain", tmp_path / "run", **SETTINGS)
    with pytest.raises(ValueError, match="trains the float network itself, got a quantized one"):
        try_to_fit(quantize(network()), None, "float", tmp_path / "run", **SETTINGS)


def test_fewer_images_than_a_batch(tmp_path: Path):
    with pytest.raises(ValueError, match="batch_size is 128, but digits has 96 images; lower it"):
        train("plain", tmp_path / "run", batch_size=128)


def test_a_device_that_is_not_there(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device is 'cuda', but PyTorch finds no GPU"):
        train("plain", tmp_path / "run", device="cuda")


def test_misspelt_settings():
    with pytest.raises(TypeError, match="epoch"):
        train("plain", epoch=3)


def test_nan_where_calibration_looks(tmp_path: Path):
    data = part_of_digits()
    assert isinstance(data.train, TensorSplit)
    split = TensorSplit(data.train.images.float() / 255, data.train.labels)
    split.images[:, 0, 0, 0] = torch.nan  # a split that is made of such images is refused
    with pytest.raises(ValueError, match="batches holds NaN or infinite pixels; clean the data"):
        train("plain", tmp_path / "run", data=replace(data, train=split))
    assert not (tmp_path / "run").exists()


def test_nothing_is_kept_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = train("plain", epochs=1, tensorboard=True)
    assert result.folder is None
    assert not list(tmp_path.iterdir())


def test_the_normalisation_of_the_caller_wins():
    own = Normalisation((0.5,), (0.5,))
    student = network()
    result = fit(student, recipe=make("float"), data=part_of_digits(), normalisation=own, progress=False, **SETTINGS)
    assert result.normalisation == own
    assert result.student is student


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return part_of_digits(320, 100)


def test_bf16_learns(digits: Dataset, tmp_path: Path):
    result = train("float", tmp_path, data=digits, epochs=8, precision="bf16")
    assert result.accuracy > 0.6
    assert all(p.dtype == torch.float32 for p in result.student.parameters())
    student = quantize(result.student, weights=4, activations=4)
    common = {**SETTINGS, "lr": 0.01, "clip_grad": 1.0, "precision": "bf16", "progress": False}
    taught = fit(student, result.student, recipe=make("qfd"), data=digits, **common)
    assert taught.accuracy > 0.6
    assert taught.skipped_steps == 0


def test_bf16_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"precision": "bf16", "checkpoint_seconds": 0, "shape": {"dropout": 0.3}}
    train("qfd", tmp_path / "whole", **settings)
    with stopped_at(monkeypatch, 5, written=True):
        train("qfd", tmp_path / "stopped", **settings)
    train("qfd", tmp_path / "stopped", resume=True, **settings)
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),  # float32 without the compiler keeps its bits
        ({"compile": True}, True),
        ({"precision": "bf16"}, True),
        ({"compile": True, "channels_last": False}, False),
        ({"channels_last": True}, True),
    ],
)
def test_channels_last_by_default_where_bits_are_free(
    settings: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fused, "reason", lambda device: "")  # as on a GPU that has a compiler
    convolutional, linear = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Linear(3, 4))
    given = Settings(**settings)
    assert (memory_format(given, convolutional) == torch.channels_last) is wanted
    assert (memory_format(given, linear) == torch.channels_last) is bool(given.channels_last)
    said = remarks(given, convolutional, torch.device("cuda"), make("plain"))
    assert bool(said) is (wanted and given.channels_last is None)
    assert all("--no-channels-last" in line for line in said)


@pytest.mark.parametrize(
    ("recipe", "says"), [("logits", False), ("qfd", False), ("plain", True), ("joint", True), ("blockwise", False)]
)
def test_a_teacher_s_precision_without_a_frozen_teacher_is_said(recipe: str, says: bool):
    said = remarks(Settings(teacher_precision="bf16"), nn.ReLU(), torch.device("cpu"), make(recipe))
    assert any("asks no frozen teacher" in line for line in said) is says


def test_bf16_in_channels_last_trains_and_says_so(capsys: pytest.CaptureFixture[str]):
    student = network(0)
    settings = SETTINGS | {"epochs": 1, "precision": "bf16", "progress": True}
    fit(student, recipe=make("float"), data=part_of_digits(), **settings)
    assert "channels-last" in capsys.readouterr().err
    assert student.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not student.conv2.weight.is_contiguous()


def test_channels_last_gives_close_losses_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"channels_last": True, "checkpoint_seconds": 0}
    train("float", tmp_path / "usual", checkpoint_seconds=0)
    train("float", tmp_path / "whole", **settings)
    assert losses(tmp_path / "usual") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    with stopped_at(monkeypatch, 5, written=True):
        train("float", tmp_path / "stopped", **settings)
    train("float", tmp_path / "stopped", resume=True, **settings)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if record["event"] == "train"]


@pytest.mark.slow
def test_compiled_runs_have_close_losses_and_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Evaluations between the epochs run the tapped network too; they must not make the objective compile again."""
    monkeypatch.setattr(loop_module, "LOG_EVERY", 1)
    settings = {"epochs": 3, "lr": 0.01, "shape": {"norm": True}}
    train("features", tmp_path / "usual", **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train("features", tmp_path / "compiled", **settings, compile=True)
    one, two = losses(tmp_path / "usual"), losses(tmp_path / "compiled")
    assert len(one) == 18
    assert two[:3] == pytest.approx(one[:3], rel=1e-4)
    assert two == pytest.approx(one, rel=0.2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    keys = read_metrics(tmp_path / "compiled")[-1].keys()
    assert keys == read_metrics(tmp_path / "usual")[-1].keys()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_says_what_the_metrics_say(tmp_path: Path):
    train("qfd", tmp_path, tensorboard=True)
    got = scalars(tmp_path)
    for record in read_metrics(tmp_path):
        for name, value in record.items():
            if name not in {"event", "phase", "step", "epoch"} and not isinstance(value, str):
                assert (record["step"], pytest.approx(float(value))) in got[f"{record['phase']}/{name}"]


@pytest.mark.parametrize(("save", "written"), [(6, True), (8, False)])
def test_tensorboard_of_a_resumed_run_has_every_event_once(
    save: int, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Step 6 ends an epoch: its evaluation was purged although its checkpoint was behind it."""
    settings = {"tensorboard": True, "checkpoint_seconds": 0}
    train("plain", tmp_path / "whole", **settings)
    with stopped_at(monkeypatch, save, written=written):
        train("plain", tmp_path / "stopped", **settings)
    time.sleep(1.1)  # TensorBoard reads files by name, and their names have whole seconds and the process in them
    train("plain", tmp_path / "stopped", resume=True, **settings)
    one, two = scalars(tmp_path / "whole"), scalars(tmp_path / "stopped")
    assert one.keys() == two.keys()
    assert timeless(one) == timeless(two)
    for tag in one.keys() - timeless(one).keys():
        assert [step for step, _ in one[tag]] == [step for step, _ in two[tag]]
