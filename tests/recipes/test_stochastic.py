"""Stochastic precision: what is drawn as one, how often, and that a draw depends on seed and step alone."""

from typing import Any

import pytest
import torch
from torch import nn

from fewbits.convert import Rule, quantize, quantizers_of
from fewbits.distill import Objective
from fewbits.precision import fragments_of, is_fully_quantized
from fewbits.recipes import Features, Joint, Stochastic

from .zhuang import batch, network


def begun(recipe: Any = None, seed: int = 0, **options: Any) -> Objective:
    teacher = network()
    student = quantize(teacher, 2, 2, **options)
    return (recipe or Stochastic()).objective(student, teacher, batches=[batch()], seed=seed)


def gates(student: nn.Module) -> dict[str, bool]:
    return {name: bool(q.enabled) for name, q in quantizers_of(student) if not q.spec.fixed}


def test_delta_falls_linearly():
    schedule = Stochastic(delta=0.5, until=0.5).phases()[0].precision
    assert [schedule.at(p).probability for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.5, 0.75, 1.0, 1.0, 1.0]
    assert Stochastic(delta=1.0, until=1.0).phases()[0].precision.at(0.1).probability == pytest.approx(0.1)


@pytest.mark.parametrize("fragment", ["block", "layer"])
def test_a_fragment_moves_as_one(fragment: Any):
    """Two convolutions of a block share a draw; as layers they have their own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu()).relu()

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Block(), Block(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    student = quantize(model, 2, 2, residual=None)
    found = [len(f) for f in fragments_of(student, ("1", "2"), fragment)]
    assert found == ([4, 4, 2] if fragment == "block" else [2, 2, 2, 2, 2])


@pytest.mark.parametrize("separate", [True, False])
def test_how_often(separate: bool):
    made = begun(Stochastic(delta=0.4, until=1.0, separate=separate))
    counts: dict[str, int] = {}
    together = 0
    for step in range(400):
        made.set_progress(0.0, step)
        now = gates(made.networks.student)
        for name, on in now.items():
            counts[name] = counts.get(name, 0) + on
        together += now["layer1.0.0.weight_quantizer"] == now["layer1.0.0.input_quantizer"]
    # 1 - delta = 0.6 of 400, standard deviation 9.8.
    assert all(abs(count - 240) < 50 for count in counts.values())
    assert together == 400 if not separate else 150 < together < 280


def test_fragments_are_drawn_independently():
    made = begun()
    pairs = set()
    for step in range(40):
        made.set_progress(0.0, step)
        now = gates(made.networks.student)
        pairs.add((now["layer1.0.0.weight_quantizer"], now["layer2.1.0.weight_quantizer"]))
    assert len(pairs) == 4


def draws(made: Objective, steps: range) -> list[dict[str, bool]]:
    seen = []
    for step in steps:
        made.set_progress(0.1, step)
        seen.append(gates(made.networks.student))
    return seen


def test_the_draw_is_a_function_of_seed_and_step():
    first = draws(begun(seed=3), range(12))
    torch.manual_seed(99)
    assert draws(begun(seed=3), range(12)) == first
    assert draws(begun(seed=3), range(5, 12)) == first[5:]  # whatever came before: a resumed run draws the same
    assert draws(begun(seed=4), range(12)) != first


def test_it_ends_fully_quantized():
    made = begun()
    made.set_progress(0.0, 7)
    assert not is_fully_quantized(made.networks.student)
    made.set_progress(0.5, 8)
    assert is_fully_quantized(made.networks.student)
    made.set_progress(0.4, 9)
    made.set_progress(1.0, 10)
    assert is_fully_quantized(made.networks.student)


def test_what_the_plan_fixes_is_never_dropped():
    made = begun(rules=[Rule("layer1.0", weights=3, activations=3)])
    for step in range(20):
        made.set_progress(0.0, step)
        assert all(bool(q.enabled) for _, q in quantizers_of(made.networks.student) if q.spec.fixed)


def test_with_other_recipes():
    for other in (Features(), Joint()):
        made = begun(other + Stochastic())
        made.set_progress(0.0, 1)
        made(*batch()).total.backward()
        assert made.phase.precision == Stochastic().phases()[0].precision
    assert begun(Joint() + Stochastic()).phase.trains[1].network == "teacher"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "delta must be a number above 0 and at most 1, got .*; the paper starts at 0.5"),
        ({"delta": 1.5}, "delta must be a number above 0 and at most 1, got .*; the paper starts at 0.5"),
        ({"until": 0.0}, "until must be a number above 0 and at most 1, got"),
        ({"fragment": "filter"}, "fragment must be one of block, layer, got 'filter'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Stochastic(**options)
