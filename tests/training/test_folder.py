"""Run folders: never two runs in one, and everything that made a run written down."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_worker import part_of_digits, same_run, stopped_at, train

from fewbits.recipes import make
from fewbits.training import Settings, read_json, read_metrics
from fewbits.training import step as step_module
from fewbits.training.folder import RunFolder, as_data


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and bytes."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def test_a_file_is_no_run_folder(tmp_path: Path):
    (tmp_path / "student.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"student\.onnx is no run folder: it is a file"):
        read_json(tmp_path / "student.onnx" / "run.json")


def test_a_run_that_is_there_is_refused(tmp_path: Path):
    train("plain", tmp_path, epochs=1)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="already holds a run; pass --resume to continue it, or choose another folder"):
        train("plain", tmp_path, epochs=1)
    assert content(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another folder"):
        train("plain", tmp_path, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("where", ["make_optimizer", "prepare", "backward"])
def test_a_run_without_a_first_step_leaves_its_folder_free(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Found: the next try was refused, "already holds a run"."""

    def fail(*args: object, **named: object) -> None:
        raise RuntimeError("before the first step")

    with monkeypatch.context() as patch:
        patch.setattr(step_module, where, fail)
        with pytest.raises(RuntimeError, match="before the first step"):
            train("plain", tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    assert train("plain", tmp_path / "run", epochs=1).folder == tmp_path / "run"


def test_a_run_that_took_a_step_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stopped_at(monkeypatch, 1, written=False):
        train("plain", tmp_path)
    with pytest.raises(ValueError, match="already holds a run; pass --resume"):
        train("plain", tmp_path)


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"output must be a folder, but .*file is a file;"):
                train("plain", output, epochs=1, resume=resume)


def test_other_settings_are_refused_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stopped_at(monkeypatch, 3, written=True):
        train("plain", tmp_path, checkpoint_seconds=0)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"cannot resume .* with other settings than its own") as caught:
        train("plain", tmp_path, lr=0.1, epochs=3, seed=7, ema=0.9, resume=True)
    message = str(caught.value)
    for part in (
        "settings.lr: 0.05 there, 0.1 now",
        "settings.epochs: 2 there, 3 now",
        "settings.seed: 0 there, 7 now",
        "settings.ema: None there, 0.9 now",
    ):
        assert part in message
    assert message.count(" there, ") == 4
    assert content(tmp_path) == before


def test_another_recipe_or_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stopped_at(monkeypatch, 3, written=True):
        train("plain", tmp_path, checkpoint_seconds=0)
    with pytest.raises(ValueError, match=r"recipe.name: 'plain' there, 'features' now"):
        train("features", tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"data.num_train: 96 there, 64 now"):
        train("plain", tmp_path, data=part_of_digits(64), resume=True)
    with pytest.raises(ValueError, match="plan"):
        train("float", tmp_path, resume=True)


def test_what_does_not_change_the_result_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train("plain", tmp_path / "whole", tensorboard=False)
    with stopped_at(monkeypatch, 3, written=True):
        train("plain", tmp_path / "stopped", checkpoint_seconds=0)
    train("plain", tmp_path / "stopped", checkpoint_seconds=77.0, tensorboard=False, resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_resume_without_a_run_starts_afresh(tmp_path: Path):
    train("plain", tmp_path / "whole", epochs=1)
    train("plain", tmp_path / "missing", epochs=1, resume=True)
    (tmp_path / "empty").mkdir()
    train("plain", tmp_path / "empty", epochs=1, resume=True)
    for name in ("missing", "empty"):
        same_run(tmp_path / "whole", tmp_path / name)


def test_resume_before_the_first_checkpoint_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stopped_at(monkeypatch, 1, written=False):
        train("plain", tmp_path / "stopped", checkpoint_seconds=1e9)
    assert read_metrics(tmp_path / "stopped")
    train("plain", tmp_path / "stopped", epochs=1, lr=0.01, resume=True)  # nothing there was worth keeping
    train("plain", tmp_path / "whole", epochs=1, lr=0.01)
    same_run(tmp_path / "whole", tmp_path / "stopped")
    assert read_json(tmp_path / "stopped/run.json")["settings"]["lr"] == 0.01


def test_a_wrong_argument_leaves_no_run_behind(tmp_path: Path):
    """The corrected command was told that the folder already held a run."""
    for wrong in ({"batch_size": 1000}, {"processes": 3}):
        with pytest.raises(ValueError, match=r"batch_size|processes"):
            train("plain", tmp_path / "run", epochs=1, **wrong)
        assert not (tmp_path / "run").exists()
    train("plain", tmp_path / "run", epochs=1)


def test_a_finished_run_is_left_alone(tmp_path: Path):
    first = train("qfd", tmp_path, ema=0.9)
    before = content(tmp_path)
    again = train("qfd", tmp_path, ema=0.9, resume=True)
    assert content(tmp_path) == before
    for name in ("accuracy", "best_accuracy", "ema_accuracy", "skipped_steps", "seconds", "normalisation"):
        assert getattr(again, name) == getattr(first, name), name
    one, two = first.student.state_dict(), again.student.state_dict()
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)
    assert not again.student.training


def test_a_finished_run_with_damaged_files_says_which(tmp_path: Path):
    train("plain", tmp_path, epochs=1)
    student = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "student.safetensors").write_bytes(student[:100])
    with pytest.raises(ValueError, match=r"student\.safetensors is damaged"):
        train("plain", tmp_path, epochs=1, resume=True)
    (tmp_path / "student.safetensors").write_bytes(student)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl .*end"):
        train("plain", tmp_path, epochs=1, resume=True)


def test_a_run_without_its_description_is_refused(tmp_path: Path):
    train("plain", tmp_path, epochs=1)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        train("plain", tmp_path, epochs=1, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        train("plain", tmp_path, epochs=1, resume=True)


def test_equal_runs_give_equal_files(tmp_path: Path):
    train("plain", tmp_path / "one", epochs=1, ema=0.9)
    train("plain", tmp_path / "two/deeper", epochs=1, ema=0.9)
    same_run(tmp_path / "one", tmp_path / "two/deeper")
    for path in (tmp_path / "one").glob("student*.safetensors"):
        size = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + size])
        assert "__metadata__" not in header
        assert str(tmp_path).encode() not in path.read_bytes()
        assert os.uname().nodename.encode() not in path.read_bytes()


def test_run_json_says_what_made_the_run(tmp_path: Path):
    train("qfd", tmp_path, epochs=1)
    run = read_json(tmp_path / "run.json")
    assert run["recipe"]["name"] == "qfd"
    assert run["settings"]["batch_size"] == 16
    assert run["data"]["name"] == "digits"
    assert run["normalisation"] == {"is": "Normalisation", "mean": [0.305], "std": [0.3757]}
    assert run["plan"]["weights"] == 3
    assert run["torch_threads"] == 1
    assert run["deterministic"] is False
    assert str(tmp_path) not in json.dumps(run)


def test_a_half_written_line_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train("plain", tmp_path / "whole")
    with stopped_at(monkeypatch, 1, written=True):
        train("plain", tmp_path / "stopped")
    with (tmp_path / "stopped/metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')
    train("plain", tmp_path / "stopped", resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_litter_of_a_killed_writer_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stopped_at(monkeypatch, 1, written=True):
        train("plain", tmp_path)
    litter = [tmp_path / "checkpoint/.state.safetensors.123.part", tmp_path / ".student.safetensors.123.part"]
    for path in litter:
        path.write_bytes(b"half")
    train("plain", tmp_path, resume=True)
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_is_written_before_the_run_begins(tmp_path: Path):
    folder = RunFolder(tmp_path / "run", {"settings": Settings()}, resume=False)
    assert not folder.path.exists()
    folder.begin(0)
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl", "run.json"]
    assert not folder.is_finished


def test_frozen_data_becomes_json_that_tells_classes_apart():
    recipes: list[Any] = [as_data(make(name)) for name in ("float", "plain", "logits", "features", "qfd")]
    texts = {json.dumps(recipe, sort_keys=True) for recipe in recipes}
    assert len(texts) == len(recipes)
    one = as_data(make("qfd", {"weight": 0.5}))
    assert one == as_data(make("qfd")) != as_data(make("qfd", {"weight": 0.25}))
    assert as_data(Settings()) != as_data(replace(Settings(), lr=0.1))
