"""Rows of a comparison where little is there: no run, one run, a term that came late, records of the teacher."""

import pytest

from fewbits.recipes.cost import Cost
from fewbits.report.arms import Arm, cells, headings, markdown, rows
from fewbits.report.paired import difference, spread
from fewbits.report.runs import Run, of_student


def run(accuracy: float, *shares: dict[str, float], phase: str = "student") -> Run:
    measured = [{"event": "shares", "phase": phase, "step": n, "epoch": 0.0, **s} for n, s in enumerate(shares)]
    end = {"event": "end", "phase": "student", "step": 10, "epoch": 1.0, "accuracy": accuracy, "seconds": 2.0}
    return Run("run", {}, (*measured, end | {"best_accuracy": accuracy}), {}, (), {})


def test_an_arm_without_runs():
    found = rows([Arm("plain", Cost(1, 0), {0: run(0.5)}), Arm("qfd", Cost(1, 0.8), {})])
    assert found[1].last is found[1].difference is found[1].steps is None
    assert cells(found[1])[1:] == ["0", *["–"] * 8]
    assert cells(found[0])[2:4] == ["50.00", "50.00"]  # no deviation of one run


def test_the_first_arm_without_the_others_seed():
    found = rows([Arm("plain", Cost(1, 0), {0: run(0.5)}), Arm("qfd", Cost(1, 0.8), {1: run(0.6)})])
    assert found[1].difference is None


def test_shares_of_few_measurements_are_one_mean():
    shares = [{"share/features": 1.0, "share/cross_entropy": 1.0}, {"share/features": 3.0}]
    row = rows([Arm("features", Cost(1, 1), {0: run(0.5, *shares)})])[0]
    assert row.shares == {"features": (2.0,), "cross_entropy": (1.0,)}
    assert cells(row)[-1] == "features 2"


def test_the_teachers_phase_is_not_the_students_share():
    row = rows([Arm("qfd", Cost(1, 1), {0: run(0.5, {"share/teacher_cross_entropy": 1.0}, phase="teacher")})])[0]
    assert row.shares == {}


def test_a_teacher_that_trains_along_is_not_the_student():
    """Found: with joint distillation both are evaluated in the student's phase, and the teacher's record came last."""
    both = [
        {"event": "evaluation", "phase": "student", "step": 1, "epoch": 1, "accuracy": a, "network": n}
        for n, a in (("student", 0.4), ("teacher", 0.9))
    ]
    assert [of_student(record) for record in both] == [True, False]
    unfinished = Run("run", {}, tuple(both), {}, (), {})
    assert unfinished.accuracy == unfinished.best_accuracy == 0.4


def test_every_line_has_every_column():
    found = rows([Arm("plain", Cost(1, 0), {0: run(0.5), 1: run(0.7)}), Arm("qfd", Cost(1, 0.8), {0: run(0.6)})])
    lines = markdown(found).splitlines()
    assert {line.count(" | ") for line in lines} == {len(headings("plain")) - 1}
    assert "| qfd | 1 | 60.00 | 60.00 | +10.00 | 2 | 10 | 10 | 8 | – |" in lines


def test_spread_and_difference_of_nothing():
    assert spread([]) is None
    assert difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("num", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (31, 2.042)])
def test_the_interval_against_a_printed_table(num: int, quantile: float):
    values = {seed: float(seed) for seed in range(num)}
    mean = sum(values.values()) / num
    std = (sum((v - mean) ** 2 for v in values.values()) / (num - 1)) ** 0.5
    found = difference(values, dict.fromkeys(values, 0.0))
    assert found is not None
    assert found.high is not None
    assert (found.high - found.mean) * num**0.5 / std == pytest.approx(quantile, abs=1e-3)
