"""`fewbits compare` on digits: the table against the run folders by hand, equal starts, interruption, bad input."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.cli import main
from fewbits.commands import Compare, compare, load_run
from fewbits.data import load
from fewbits.models.registry import MODELS
from fewbits.training import Settings, read_metrics
from fewbits.training import loop as loop_module

T_2 = 4.302652729911275  # 97.5 % of Student's t with 2 degrees of freedom, from a printed table

RECIPES = "plain,logits,again=logits,qfd,joint"
SHORT = ["--epochs", "0.5", "--batch-size", "32", "--warmup-steps", "2", "--bn-batches", "2", "--per-class", "30"]
SHORT += ["--no-progress", "--no-tensorboard", "--gradient-shares", "6", "--seed", "4"]


class Tiny(nn.Module):
    """Seconds for a whole comparison."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, padding=1)
        self.layer1, self.layer2 = (
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(2)
        )
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Tiny)
        patch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)
        yield


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def comparison(folder: Path, *more: object) -> list[object]:
    bits = ["--weights", 3, "--activations", 3, "--residual", "none", "--teacher-epochs", 1]
    return ["compare", "--model", "tiny", "--data", "digits", "--output", folder, *bits, *SHORT, *more]


def whole(folder: Path, *more: object) -> list[object]:
    return comparison(folder, "--recipes", RECIPES, "--options", "again:temperature=1.5", "--seeds", 3, *more)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "all"
    assert run(*whole(folder)) == 0
    return folder


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}


def ends(folder: Path, name: str) -> list[dict[str, Any]]:
    return [read_metrics(folder / f"{name}-s{seed}")[-1] for seed in (4, 5, 6)]


def message(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# The numbers


def test_means_deviations_and_differences_by_hand(compared: Path):
    table = rows(compared)
    assert list(table) == ["plain", "logits", "again", "qfd", "joint"]
    first = [end["accuracy"] for end in ends(compared, "plain")]
    assert len(set(first)) > 1
    for name, row in table.items():
        assert row["seeds"] == [4, 5, 6]
        for key, field in (("last", "accuracy"), ("best", "best_accuracy")):
            values = [end[field] for end in ends(compared, name)]
            mean = sum(values) / 3
            assert row[key]["mean"] == pytest.approx(mean)
            assert row[key]["std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
        assert row["seconds"] == pytest.approx(sum(end["seconds"] for end in ends(compared, name)) / 3)
        if name == "plain":
            assert row["difference"] is None
            continue
        pairs = [end["accuracy"] - base for end, base in zip(ends(compared, name), first, strict=True)]
        mean = sum(pairs) / 3
        half = T_2 * math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / 2) / math.sqrt(3)
        assert row["difference"]["mean"] == pytest.approx(mean)
        assert row["difference"]["low"] == pytest.approx(mean - half)
        assert row["difference"]["high"] == pytest.approx(mean + half)


def test_passes_are_those_of_the_phases(compared: Path):
    table = rows(compared)
    assert {row["steps"] for row in table.values()} == {4}  # half an epoch of 300 images
    passes = {name: (row["trained_passes"], row["frozen_passes"]) for name, row in table.items()}
    assert passes == {"plain": (4, 0), "logits": (4, 4), "again": (4, 4), "qfd": (4, 3), "joint": (8, 0)}


def test_shares_are_means_of_thirds_over_seeds(compared: Path):
    for name, term in (("logits", "logits"), ("qfd", "quantized_features"), ("joint", "attention")):
        parts: list[list[float]] = [[], [], []]
        for seed in (4, 5, 6):
            measured = [r for r in read_metrics(compared / f"{name}-s{seed}") if r["event"] == "shares"]
            values = [r[f"share/{term}"] for r in measured if r["phase"] == "student"]
            third = len(values) // 3
            assert third >= 1
            for part, chosen in zip(parts, (values[:third], values[third:-third], values[-third:]), strict=True):
                part.append(sum(chosen) / len(chosen))
        expected = [sum(part) / 3 for part in parts]
        assert rows(compared)[name]["shares"][term] == pytest.approx(expected)
        assert rows(compared)[name]["shares"]["cross_entropy"] == pytest.approx([1, 1, 1])


def test_the_page_says_what_the_numbers_say(compared: Path):
    page = (compared / "comparison.md").read_text()
    for name, row in rows(compared).items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert f"{100 * row['last']['mean']:.2f} ± {100 * row['last']['std']:.2f}" in line
        if row["difference"]:
            assert f"[{100 * row['difference']['low']:+.2f}, {100 * row['difference']['high']:+.2f}]" in line
    assert "tiny on digits, W3/A3 (lsq, ends 8, residual None)" in page


# The runs


def test_everyone_starts_alike(compared: Path):
    """Same data and same start for each seed; the options go to the recipe that they name."""
    for seed in (4, 5, 6):
        made = {name: json.loads((compared / f"{name}-s{seed}" / "run.json").read_text()) for name in rows(compared)}
        assert {entry["start"] for entry in made.values()} == {f"run s{seed} (tiny)"}
        assert len({json.dumps([e["settings"], e["data"], e["plan"]], sort_keys=True) for e in made.values()}) == 1
        assert all(entry["settings"]["seed"] == seed for entry in made.values())
        assert made["again"]["recipe_options"] == {"temperature": 1.5}
        assert made["logits"]["recipe_options"] == {}
    assert sorted(path.name for path in (compared / "teacher").iterdir()) == ["s4", "s5", "s6"]


def test_a_run_is_what_train_would_have_made(compared: Path, tmp_path: Path):
    arguments = ["--weights", 3, "--activations", 3, "--residual", "none", "--recipe", "qfd", *SHORT[:-2], "--seed", 5]
    teacher = compared / "teacher" / "s5"
    assert run("train", "--model", "tiny", "--data", "digits", "--teacher", teacher, *arguments,
               "--output", tmp_path / "one") == 0  # fmt: skip
    ours, theirs = (load_run(folder)[0].state_dict() for folder in (compared / "qfd-s5", tmp_path / "one"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_finished_is_not_repeated(compared: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        raise AssertionError("a run was repeated")

    monkeypatch.setattr(loop_module.Loop, "run", fail)
    before = rows(compared)
    files = {path: path.read_bytes() for path in compared.glob("*-s*/*.*")}
    assert run(*whole(compared)) == 0
    assert rows(compared) == before
    assert {path: path.read_bytes() for path in files} == files


def test_interrupted_and_continued_equals_uninterrupted(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Ctrl-C in the middle of the third recipe; the same command goes on from the checkpoint."""
    original, folder = loop_module.Loop._after_step, tmp_path / "part"

    def stop(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.folder.path.name == "again-s4" and self.position.total_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "_after_step", stop)
        assert run(*whole(folder, "--checkpoint-seconds", 0)) == 130
    assert "continue with the same command" in message(capsys)
    assert {name: len(row["seeds"]) for name, row in rows(folder).items()} == {
        "plain": 1, "logits": 1, "again": 0, "qfd": 0, "joint": 0
    }  # fmt: skip
    assert rows(folder)["logits"]["difference"]["low"] is None  # one pair has no interval
    resumed = []
    resume = loop_module.Loop._resume
    monkeypatch.setattr(
        loop_module.Loop, "_resume", lambda self, *a: (resumed.append(self.folder.path.name), resume(self, *a))[1]
    )
    assert run(*whole(folder, "--checkpoint-seconds", 0)) == 0
    assert resumed == ["again-s4"]
    for path in compared.glob("*-s*/student.safetensors"):
        assert (folder / path.parent.name / path.name).read_bytes() == path.read_bytes()
    for name, row in rows(compared).items():
        assert rows(folder)[name] == row | {"seconds": rows(folder)[name]["seconds"]}


def test_equal_passes_give_fewer_steps_to_two_networks(tmp_path: Path):
    arguments = ["--recipes", "plain", "joint", "float", "--seeds", 1, "--budget", "passes", "--epochs", 1]
    assert run(*comparison(tmp_path / "run", *arguments)) == 0
    table = rows(tmp_path / "run")
    assert [(row["steps"], row["trained_passes"]) for row in table.values()] == [(9, 9), (4, 8), (9, 9)]
    assert table["joint"]["difference"]["num_pairs"] == 1
    assert "start: run s4 (tiny) (float: random)" in (tmp_path / "run" / "comparison.md").read_text()


def test_images_that_the_pretrained_network_has_seen_are_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = (Tiny(10, 1).state_dict(), load("digits").normalisation)
    monkeypatch.setattr("fewbits.models.pretrained", lambda *args: own)
    settings = Settings(epochs=0.2, batch_size=32, bn_batches=2, tensorboard=False)
    options: dict[str, Any] = {"recipes": ("plain",), "seeds": 1, "hold_out": 200, "progress": False}
    with pytest.warns(UserWarning, match="pretrained tiny has seen the images"):
        found = compare(Compare("tiny", "digits", output=tmp_path / "run", settings=settings, **options))
    assert found[0].name == "plain"
    assert "200 held-out images" in (tmp_path / "run" / "comparison.md").read_text()


# Bad input


def test_runs_with_other_settings_are_named(compared: Path, capsys: pytest.CaptureFixture[str]):
    changed = [*whole(compared), "--weight-decay", "0.5", "--teacher-epochs", "1"]
    assert run(*changed) == 1
    assert "settings.weight_decay: 0.0001 there, 0.5 now" in message(capsys)
    options = [str(a).replace("temperature=1.5", "temperature=9") for a in whole(compared)]
    assert run(*options) == 1
    said = message(capsys)
    assert "again-s4" in said.replace(" ", "")
    assert "recipe_options.temperature: 1.5 there, 9 now" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipes", "plain", "qdf"], "'qdf'"),
        (["--recipes", ","], "recipes is empty"),
        (["--recipes", "qfd,qfd"], "'qfd' twice"),
        (["--recipes", "../x=qfd"], "letters, digits"),
        (["--seeds", "0"], "seeds must be positive, got 0"),
        (["--options", "joint:beta=1"], "NAME one of plain, logits, features, qfd; got 'joint:beta=1'"),
        (["--options", "weight=1"], "NAME:option=value"),
        (["--options", "qfd:wait=1"], "no option 'wait'"),
        ([], "pass --teacher-epochs N"),
        (["--recipes", "plain,qfd", "--scratch"], "(needed by qfd)"),
        (["--teacher", "nowhere"], "does not exist"),
        (["--teacher", "nowhere", "--teacher-epochs", "1"], "exclude each other"),
        (["--recipes", "plain,dtq"], "dtq for minmax"),
    ],
)
def test_bad_arguments_say_what_is_allowed(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "out"
    assert run("compare", "--model", "tiny", "--data", "digits", "--output", folder, *SHORT, *arguments) == 1
    assert said in message(capsys)
    assert not folder.exists()
