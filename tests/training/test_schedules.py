"""The learning rate and the phases' steps, against slow recomputation."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fewbits.training import Settings
from fewbits.training.schedules import lr_factor, phase_steps


def slow_factor(step: int, num_steps: int, kind: str, warmup_steps: int, milestones: tuple[float, ...]) -> float:
    warmup = warmup_steps if warmup_steps <= num_steps // 10 else num_steps // 10
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "step":
        factor = 1.0
        for milestone in milestones:
            if step >= milestone * num_steps:
                factor *= 0.1
        return factor
    angle = math.pi * (step - warmup) / (num_steps - warmup)
    return (1 + math.cos(angle)) / 2


@given(
    num_steps=st.integers(1, 300),
    warmup=st.integers(0, 50),
    kind=st.sampled_from(["cosine", "step", "constant"]),
    milestones=st.lists(st.floats(0.01, 0.99), max_size=3).map(tuple),
)
def test_factors_equal_slow_ones(num_steps: int, warmup: int, kind: str, milestones: tuple[float, ...]):
    settings = Settings(schedule=kind, warmup_steps=warmup, milestones=milestones)
    for step in range(num_steps):
        expected = slow_factor(step, num_steps, kind, warmup, milestones)
        assert lr_factor(step, num_steps, settings) == pytest.approx(expected, abs=1e-12)


@given(num_steps=st.integers(1, 300), warmup=st.integers(0, 50), kind=st.sampled_from(["cosine", "step", "constant"]))
def test_every_step_moves_and_none_exceeds_the_peak(num_steps: int, warmup: int, kind: str):
    factors = [lr_factor(s, num_steps, Settings(schedule=kind, warmup_steps=warmup)) for s in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    behind = factors[min(warmup, num_steps // 10) :]
    assert behind == sorted(behind, reverse=True)


@given(shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), num_steps=st.integers(1, 100_000))
def test_the_phases_share_all_steps(shares: list[float], num_steps: int):
    assume(min(shares) / sum(shares) * num_steps > 1.5)  # else a phase may round to none
    steps = phase_steps(tuple(shares), num_steps)
    assert sum(steps) == num_steps
    assert min(steps) >= 1
    for share, count in zip(shares, steps, strict=True):
        assert abs(share / sum(shares) * num_steps - count) <= 1


def test_too_few_steps_for_the_phases():
    with pytest.raises(ValueError, match="1 steps are too few for phases with shares"):
        phase_steps((0.2, 0.8), 1)
