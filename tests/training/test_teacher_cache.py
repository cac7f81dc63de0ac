"""A teacher's answers on disk: the same run without its passes; nothing of another teacher, nothing damaged."""

import errno
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_worker import network, part_of_digits, same_run, stopped_at, train

from fewbits.convert import quantize
from fewbits.data import NONE, Augment, Dataset
from fewbits.recipes import Recipe, make
from fewbits.training import read_metrics, teacher_cache
from fewbits.training.teacher_cache import TeacherCache

MOVED = Augment(pad=1, flip=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many pictures of each training batch the teacher was needed."""
    counted: list[int] = []
    original = TeacherCache.__call__

    def call(self: TeacherCache, batch: Any) -> Any:
        found = self._found
        answers = original(self, batch)
        counted.append(len(batch.images) - (self._found - found))
        return answers

    monkeypatch.setattr(TeacherCache, "__call__", call)
    return counted


def digits(augment: Augment = NONE) -> Dataset:
    return replace(part_of_digits(), augment=augment)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.mark.parametrize("augment", [NONE, MOVED], ids=["fixed", "moved"])
@pytest.mark.parametrize("recipe", ["logits", "features", "qfd", "logits+features"])
def test_the_same_run_to_the_bit(recipe: str, augment: Augment, tmp_path: Path, passes: list[int]):
    train(recipe, tmp_path / "without", data=digits(augment))
    train(recipe, tmp_path / "first", data=digits(augment), teacher_cache=tmp_path / "cache")
    # What does not move looks the same in each epoch. QFD's teacher learns on its quantized feature first, and each
    # batch of the second epoch has a picture that came while it did.
    assert passes == (10 * [16] if recipe == "qfd" else 6 * [16] + 6 * [0] if augment == NONE else 12 * [16])
    seen = len(passes)
    same_run(tmp_path / "without", tmp_path / "first")
    train(recipe, tmp_path / "second", data=digits(augment), teacher_cache=tmp_path / "cache")
    assert passes[seen:] == seen * [0]
    same_run(tmp_path / "without", tmp_path / "second")
    said = [
        record["pace/kept_answers"] for record in read_metrics(tmp_path / "second") if "pace/kept_answers" in record
    ]
    assert said
    assert set(said) == {1.0}


def test_several_students_share(tmp_path: Path, passes: list[int]):
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1, lr=0.01, weight_decay=0.0)
    assert passes == 6 * [16] + 6 * [0]
    train("logits+features", data=digits(), teacher_cache=tmp_path, epochs=1)
    assert passes[12:] == 6 * [16]  # the feature is not there yet
    train("features", data=digits(), teacher_cache=tmp_path, epochs=1)
    assert passes[18:] == 6 * [0]
    assert {path.name for path in only(tmp_path).iterdir()} == {
        "about.json",
        *(f"{name}.{kind}" for name in ("logits", "fc.input") for kind in ("rows", "marks")),
    }


@pytest.mark.parametrize("other", ["teacher", "data", "augment", "seed", "teacher_precision"])
def test_answers_of_another_teacher_or_to_other_pictures_are_never_found(
    other: str, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
):
    train("logits", data=digits(MOVED), teacher_cache=tmp_path, epochs=1)
    data, seed = digits(MOVED), 0
    if other == "teacher":
        monkeypatch.setattr("training_worker.network", lambda seed, **shape: network(7 if seed == 1 else seed, **shape))
    elif other == "data":
        data = replace(data, train=data.train.subset(torch.arange(95, -1, -1)))
    elif other == "augment":
        data = digits(replace(MOVED, pad=2))
    elif other == "seed":
        seed = 1
    precision = "bf16" if other == "teacher_precision" else "same"
    train("logits", data=data, teacher_cache=tmp_path, epochs=1, seed=seed, teacher_precision=precision)
    assert passes == 12 * [16]
    assert len(list(tmp_path.iterdir())) == 2


def test_pictures_that_do_not_move_are_the_same_for_every_seed_and_batch_size(tmp_path: Path, passes: list[int]):
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1, seed=1, batch_size=32)
    assert passes == 6 * [16] + 3 * [0]


def test_a_resumed_run_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]):
    settings: dict[str, Any] = {"data": digits(MOVED), "checkpoint_seconds": 0, "accumulate": 2}
    train("logits", tmp_path / "whole", **settings)
    settings["teacher_cache"] = tmp_path / "cache"
    with stopped_at(monkeypatch, 5, written=False):
        train("logits", tmp_path / "stopped", **settings)
    assert passes == 5 * [16]
    train("logits", tmp_path / "stopped", resume=True, **settings)
    same_run(tmp_path / "whole", tmp_path / "stopped")
    assert passes[5:] == [0] + 7 * [16]  # step 5 came behind the last checkpoint, and its answers are there


def test_longer_runs_add_to_it(tmp_path: Path, passes: list[int]):
    train("logits", data=digits(MOVED), teacher_cache=tmp_path, epochs=1)
    train("logits", data=digits(MOVED), teacher_cache=tmp_path, epochs=2)
    assert passes[6:] == 6 * [0] + 6 * [16]
    train("logits", data=digits(MOVED), teacher_cache=tmp_path, epochs=1)
    assert passes[18:] == 6 * [0]


def test_damaged_answers_are_an_error(tmp_path: Path):
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)
    path = only(tmp_path) / "logits.rows"
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=r"logits\.rows is damaged.*delete its folder"):
        train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)


def test_a_file_cut_short_is_an_error(tmp_path: Path):
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)
    os.truncate(only(tmp_path) / "logits.rows", 2000)
    with pytest.raises(ValueError, match="damaged"):
        train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)


def test_a_folder_of_something_else_is_an_error(tmp_path: Path):
    train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)
    about = only(tmp_path) / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"teacher": "0"}))
    with pytest.raises(ValueError, match="another teacher, or to other data; delete it"):
        train("logits", data=digits(), teacher_cache=tmp_path, epochs=1)


def test_no_room_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3000))
    with pytest.raises(ValueError, match=r"need 0\.0 MB more .*logits of 96 pictures"):
        train("logits", tmp_path / "run", data=digits(), teacher_cache=tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_run_and_what_was_kept_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
):
    original, written = os.pwrite, 0

    def full(handle: int, content: bytes, place: int) -> int:
        nonlocal written
        written += len(content)
        if written > 2500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(handle, content, place)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.os, "pwrite", full)
        with pytest.raises(OSError, match="could not keep the teacher's answers"):
            train("logits", tmp_path / "run", data=digits(), teacher_cache=tmp_path / "cache", epochs=1)
    train("logits", tmp_path / "run2", data=digits(), teacher_cache=tmp_path / "cache", epochs=1)
    assert passes[-6:] == [0, 0, 0, 16, 16, 16]
    train("logits", tmp_path / "run3", data=digits(), epochs=1)
    same_run(tmp_path / "run2", tmp_path / "run3")


@pytest.mark.parametrize(("recipe", "why"), [("plain", "has no teacher"), ("joint", "trains its teacher along")])
def test_recipes_without_lasting_answers(recipe: str, why: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"teacher_cache is .*{why}.*leave teacher_cache out"):
        train(recipe, data=digits(), teacher_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def answers_of(recipe: Recipe) -> tuple[str, ...]:
    teacher = network(1)
    objective = recipe.objective(quantize(teacher, 3, 3), teacher, batches=[torch.rand(4, 1, 8, 8)])
    return objective.answers


def test_what_is_kept_is_what_the_terms_read():
    assert answers_of(make("logits")) == ("logits",)
    assert answers_of(make("features")) == ("fc.input",)
    assert answers_of(make("logits+features")) == ("logits", "fc.input")
    assert answers_of(make("joint", {"feature": "none"})) == ()


def test_compiled(tmp_path: Path, passes: list[int]):
    settings: dict[str, Any] = {"data": digits(), "compile": True, "epochs": 1}
    train("logits", tmp_path / "without", **settings)
    for name in ("first", "second"):
        train("logits", tmp_path / name, teacher_cache=tmp_path / "cache", **settings)
        reached = [read_metrics(tmp_path / run)[-1]["accuracy"] for run in ("without", name)]
        assert reached[0] == pytest.approx(reached[1], abs=0.04)
    assert passes == 6 * [16] + 6 * [0]
