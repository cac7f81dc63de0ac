"""Two stages, falling bits and their nesting: who is quantized with how many bits in which phase."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.convert import quantize, quantizers_of
from fewbits.layers import QuantConv2d
from fewbits.recipes import Logits, Plain, Progressive, TwoStage

from .zhuang import network, phases


def widths(student: nn.Module) -> tuple[int, int]:
    """Bits of the inner layers' weights and inputs; 32 where their gates are closed."""
    layer = student.get_submodule("layer1.1.0")
    assert isinstance(layer, QuantConv2d)
    held = (layer.weight_quantizer, layer.input_quantizer)
    assert all(q is not None for q in held)
    return tuple(q.bits if bool(q.enabled) else 32 for q in held)  # type: ignore[union-attr, return-value]


def course(recipe: Any, **options: Any) -> list[tuple[int, int]]:
    return [widths(made.networks.student) for made in phases(recipe, **options)]


def test_weights_then_activations():
    assert course(TwoStage()) == [(2, 32), (2, 2)]


def test_bits_fall_together():
    assert course(Progressive()) == [(8, 8), (4, 4), (2, 2)]
    assert course(Progressive(), bits=(2, 4)) == [(8, 8), (4, 4), (2, 4)]  # never below the plan's


def test_widths_not_above_the_plans_are_left_out():
    """Found: at 4 bits, stages of 8 and 4 trained the last stage twice; at 8 bits, three times."""
    student = quantize(network(), 4, 4)
    for recipe in (Progressive(), TwoStage(bits=(8, 4)), TwoStage() + Progressive()):
        with pytest.warns(UserWarning, match=r"^bits 4 are not above the student's, 4 for weights and 4 for activat"):
            fitted = recipe.for_student(student)
        assert fitted.schedule.bits == (8,)
        assert fitted.for_student(student) == fitted
    assert [phase.share for phase in Progressive((8,)).phases()] == [0.5, 0.5]
    with pytest.warns(UserWarning, match="bits 8, 4 are not .* no bits fall at all; quantize to fewer bits"):
        assert course(Progressive().for_student(quantize(network(), 8, 8)), bits=(8, 8)) == [(8, 8)]
    for bits in ((2, 2), (2, 4), (2, 32)):
        assert Progressive().for_student(quantize(network(), *bits)) == Progressive()
    with pytest.warns(UserWarning, match=r"^bits 8, 4 are above .* only \(2 and 8\): .* use nesting 'precisions'"):
        TwoStage(bits=(8, 4)).for_student(quantize(network(), 2, 8))
    both = TwoStage(bits=(8, 4), nesting="precisions")
    assert both.for_student(quantize(network(), 2, 8)) == both
    assert Plain().for_student(student) == Plain()
    assert Progressive().for_student(network()) == Progressive()


def test_both_nestings():
    inside = [(8, 32), (4, 32), (2, 32), (2, 8), (2, 4), (2, 2)]
    assert course(TwoStage(bits=(8, 4))) == inside
    assert course(TwoStage() + Progressive()) == inside
    assert course(Progressive() + TwoStage()) == inside
    outside = [(8, 32), (8, 8), (4, 32), (4, 4), (2, 32), (2, 2)]
    assert course(TwoStage(bits=(8, 4), nesting="precisions")) == outside


def test_shares():
    assert [phase.share for phase in TwoStage(share=0.25).phases()] == [0.25, 0.75]
    assert [phase.share for phase in Progressive().phases()] == pytest.approx([1 / 3] * 3)
    assert sum(phase.share for phase in TwoStage(bits=(8, 4)).phases()) == pytest.approx(1)


def fixed(student: nn.Module) -> dict[str, int]:
    return {name: q.bits for name, q in quantizers_of(student) if q.spec.fixed}


def test_what_the_plan_fixes_keeps_its_bits():
    seen = [fixed(made.networks.student) for made in phases(Progressive())]
    assert seen[0]
    assert seen[0] == seen[1] == seen[2]
    assert set(seen[0].values()) == {8}


def steps(student: nn.Module, role: str) -> dict[str, float]:
    return {n: float(q.step.detach()) for n, q in quantizers_of(student) if q.spec.role == role}  # type: ignore[operator]


def test_activations_join_with_ranges_of_what_the_low_bit_weights_compute():
    """Latent weights of thrice the size saturate on their grid; with weights off, ranges would grow ninefold."""
    run = phases(TwoStage(), steps=0)
    student = next(run).networks.student
    before = steps(student, "activation")
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim == 4:
                parameter.mul_(3.0)
    next(run)
    assert all(bool(q.calibrated) for _, q in quantizers_of(student))
    after = steps(student, "activation")
    inner = [name for name in after if name.startswith(("layer1.1", "layer2"))]
    assert inner
    assert all(after[name] != before[name] and after[name] < 5 * before[name] for name in inner)


def test_trained_steps_survive_a_change_of_the_other_side():
    """When activations go from 8 to 4 bits, the weights' learned steps stay as they were."""
    run = phases(TwoStage(bits=(8, 4)), steps=0)
    for _ in range(3):
        next(run)
    student = next(run).networks.student
    with torch.no_grad():
        for name, quantizer in quantizers_of(student):
            if quantizer.spec.role == "weight":
                student.get_parameter(f"{name}.step").mul_(1.25)
    trained = steps(student, "weight")
    inputs = steps(student, "activation")
    next(run)
    assert steps(student, "weight") == trained
    assert steps(student, "activation")["layer1.1.0.input_quantizer"] > inputs["layer1.1.0.input_quantizer"]


def test_start_from_quantized_weights():
    def levels(student: nn.Module) -> Iterable[int]:
        return (len(student.get_submodule(f"layer{i}.0.0").weight.unique()) for i in (1, 2))

    for start, low in (("latent", False), ("quantized", True)):
        run = phases(TwoStage(start=start), steps=2)  # type: ignore[arg-type]
        next(run)
        second = next(run)
        assert all((count <= 4) == low for count in levels(second.networks.student))


def test_composition_keeps_terms_and_teacher():
    recipe = Logits(0.3, 2.0) + TwoStage(bits=(4,))
    assert [type(t).__name__ for t in recipe.phases()[-1].terms] == ["CrossEntropy", "LogitDistance"]
    assert recipe.name == "logits+two-stage"
    assert course(recipe) == [(4, 32), (2, 32), (2, 4), (2, 2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Progressive((4, 8)), "bits must fall"),
        (lambda: Progressive((8, 8)), "bits must fall"),
        (lambda: Progressive((16, 8)), "bits must be a list, each a whole number from 1 to 8, got .16, 8.; they fall"),
        (lambda: TwoStage(share=0.0), "share must be a number between 0 and 1, got 0.0; it is"),
        (lambda: TwoStage(nesting="both"), "nesting must be one of stages, precisions"),  # type: ignore[arg-type]
        (lambda: TwoStage(start="zero"), "start must be one of latent, quantized"),  # type: ignore[arg-type]
        (lambda: Progressive() + Progressive((8,)), "both bring their own schedule"),
    ],
)
def test_bad_options(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_student_without_a_plan():
    student = quantize(network(), 2, 2)
    del student.__dict__["fewbits_plan"]
    with pytest.raises(ValueError, match="make it with quantize"):
        Progressive().objective(student, batches=[torch.randn(2, 3, 6, 6)])


def test_plain_is_one_stage():
    assert course(Plain()) == [(2, 2)]
