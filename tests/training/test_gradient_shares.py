"""Measuring the terms' shares in the gradient on the way: when, what is recorded, and that training does not notice."""

from pathlib import Path
from typing import Any

import pytest
from training_worker import records, same_run, stopped_at, train

from fewbits.training import Settings

MIXED: dict[str, Any] = {"recipe": "qfd", "shape": {"dropout": 0.3}}


def shares(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["event"] == "shares"]


def test_measuring_changes_no_bit(tmp_path: Path):
    """Dropout draws numbers and batch norm moves averages in the extra passes; both have to come back."""
    for number in (0, 4):
        train(output=tmp_path / str(number), gradient_shares=number, **MIXED)
    assert shares(tmp_path / "0") == []
    assert len(shares(tmp_path / "4")) > 2
    student = [(tmp_path / str(number) / "student.safetensors").read_bytes() for number in (0, 4)]
    assert student[0] == student[1]
    others = [r for r in records(tmp_path / "4") if r["event"] != "shares"]
    assert others == records(tmp_path / "0")


def test_each_phase_is_measured_from_its_first_step_to_its_last(tmp_path: Path):
    train(output=tmp_path / "run", gradient_shares=3, **MIXED)  # phases of 2 and 10 steps
    measured = shares(tmp_path / "run")
    assert [(r["phase"], r["step"]) for r in measured] == [
        ("teacher", 1), ("teacher", 2), ("student", 3), ("student", 7), ("student", 12)
    ]  # fmt: skip
    assert all(r["share/teacher_cross_entropy"] == pytest.approx(1) for r in measured[:2])
    for record in measured[2:]:
        assert record["share/cross_entropy"] == pytest.approx(1)
        assert record["share/quantized_features"] > 0


def test_a_resumed_run_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {**MIXED, "gradient_shares": 12, "checkpoint_seconds": 0}
    train(output=tmp_path / "whole", **settings)
    for save in (2, 5):
        folder = tmp_path / str(save)
        with stopped_at(monkeypatch, save, written=save == 5):
            train(output=folder, **settings)
        train(output=folder, resume=True, **settings)
        same_run(tmp_path / "whole", folder)


def test_a_run_may_be_resumed_with_another_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It changes no result; and runs from before the setting existed have none."""
    with stopped_at(monkeypatch, 1, written=True):
        train(output=tmp_path / "run", checkpoint_seconds=0)
    train(output=tmp_path / "run", resume=True, gradient_shares=2, checkpoint_seconds=0)
    assert shares(tmp_path / "run")


def test_a_negative_number():
    with pytest.raises(ValueError, match="gradient_shares must be a whole number of 0 or more, got -1"):
        Settings(gradient_shares=-1)
