"""The loop: an interrupted run ends with the bits of one that never stopped; who is trained how fast."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from training_worker import SETTINGS, Stopped, network, part_of_digits, same_run, stopped_at, train

from fewbits.convert import quantize
from fewbits.distill import CrossEntropy, Networks, Phase, Step, Tap, Term
from fewbits.distill.base import NetworkName
from fewbits.precision import Precision
from fewbits.quantizers import Quantizer
from fewbits.recipes import Recipe, make
from fewbits.training import Settings, fit, read_metrics
from fewbits.training import loop as loop_module
from fewbits.training.setup import make_optimizer, steps_per_epoch

NUM_STEPS = 12  # two epochs of six


def num_hooks(*networks: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for network in networks for m in network.modules())


KINDS: dict[str, dict[str, Any]] = {
    "plain-sgd-ema-dropout": {"recipe": "plain", "ema": 0.9, "shape": {"dropout": 0.3}},
    "qfd-adamw-ema-dropout": {
        "recipe": "qfd",
        "optimizer": "adamw",
        "lr": 0.01,
        "ema": 0.9,
        "shape": {"dropout": 0.3},
    },
    "plain-adamw-accumulate": {"recipe": "plain", "optimizer": "adamw", "lr": 0.01, "accumulate": 2},
    "float-step-clip": {"recipe": "float", "schedule": "step", "clip_grad": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {**KINDS[kind], "checkpoint_seconds": 0}
    train(output=tmp_path / "whole", **settings)
    for save in range(1, NUM_STEPS + 1):
        folder = tmp_path / f"stopped-{save}"
        with stopped_at(monkeypatch, save, written=save % 2 == 0):
            train(output=folder, **settings)
        train(output=folder, resume=True, **settings)
        same_run(tmp_path / "whole", folder)


def test_stopped_at_every_step_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {**KINDS["qfd-adamw-ema-dropout"], "checkpoint_seconds": 0}
    train(output=tmp_path / "whole", **settings)
    for _ in range(NUM_STEPS):
        with stopped_at(monkeypatch, 1, written=True):
            train(output=tmp_path / "stopped", resume=True, **settings)
    train(output=tmp_path / "stopped", resume=True, **settings)
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("step", [3, 6, 8, 11])
def test_steps_behind_the_last_checkpoint_are_taken_again(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {**KINDS["plain-sgd-ema-dropout"], "checkpoint_seconds": 1e9}
    train(output=tmp_path / "whole", **settings)
    original = loop_module.Loop._after_step

    def after_step(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.position.total_step == step:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "_after_step", after_step)
        with pytest.raises(Stopped):
            train(output=tmp_path / "stopped", **settings)
    train(output=tmp_path / "stopped", resume=True, **settings)
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("name", ["student-ema.safetensors", "student.safetensors"])
def test_stopped_before_the_student_is_saved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The end was recorded already: resuming must not leave two ends."""
    settings = KINDS["plain-sgd-ema-dropout"]
    train(output=tmp_path / "whole", **settings)
    fit_module = importlib.import_module("fewbits.training.fit")  # the function hides its module
    original = fit_module.save_tensors

    def save(path: Path, *args: Any) -> None:
        if path.name == name:
            raise Stopped
        original(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_tensors", save)
        with pytest.raises(Stopped):
            train(output=tmp_path / "stopped", **settings)
    train(output=tmp_path / "stopped", resume=True, **settings)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_stopped_run_resumes_with_the_very_same_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A notebook: interrupted while the student is frozen, the same student and teacher are passed again."""
    data, recipe = part_of_digits(), make("qfd")
    train("qfd", tmp_path / "whole")
    teacher = network(1)
    student = quantize(network(0), weights=3, activations=3)
    hooks = num_hooks(student, teacher)

    def again(resume: bool) -> None:
        common = {**SETTINGS, "checkpoint_seconds": 0, "progress": False}
        fit(student, teacher, recipe=recipe, data=data, output=tmp_path / "stopped", resume=resume, **common)

    for save in (1, 3):  # in the teacher's phase, in the student's
        with stopped_at(monkeypatch, save, written=True):
            again(resume=save > 1)
        assert all(p.requires_grad for p in [*student.parameters(), *teacher.parameters()])
        assert num_hooks(student, teacher) == hooks
    again(resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_global_state_of_random_numbers_does_not_matter(tmp_path: Path):
    train("qfd", tmp_path / "one", shape={"dropout": 0.3})
    torch.manual_seed(123)
    torch.rand(7)
    train("qfd", tmp_path / "two", shape={"dropout": 0.3})
    same_run(tmp_path / "one", tmp_path / "two")


def test_another_seed_is_another_run(tmp_path: Path):
    train("plain", tmp_path / "one", seed=0)
    train("plain", tmp_path / "two", seed=1)
    assert (tmp_path / "one/student.safetensors").read_bytes() != (tmp_path / "two/student.safetensors").read_bytes()


@pytest.mark.parametrize(("recipe", "epochs"), [("float", 2), ("plain", 2 / 6), ("features", 1 / 6)])
def test_accumulated_micro_batches_equal_the_whole_batch(recipe: str, epochs: float):
    # Without batch norm, whose statistics are those of a micro-batch; and before the first code tips over on the last
    # bit of a sum, where the recipe quantizes.
    whole = train(recipe, shape={"norm": False}, epochs=epochs)
    parts = train(recipe, shape={"norm": False}, epochs=epochs, accumulate=4)
    for (name, one), two in zip(whole.student.named_parameters(), parts.student.named_parameters(), strict=True):
        torch.testing.assert_close(one, two[1], rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """A float network that knows most of the digits."""
    result = train("float", data=part_of_digits(800, 200), epochs=8)
    assert result.accuracy > 0.8
    return result.student


@pytest.mark.parametrize("recipe", ["plain", "logits", "features", "qfd"])
def test_every_recipe_learns(recipe: str, teacher: nn.Module):
    # Clipped: in a network this small one large step can push a first layer's LSQ step through zero, for good.
    common = {**SETTINGS, "epochs": 2, "lr": 0.02, "clip_grad": 1.0, "ema": 0.9, "progress": False}
    student = quantize(teacher, weights=3, activations=3)
    result = fit(student, teacher, recipe=make(recipe), data=part_of_digits(800, 200), **common)
    assert result.accuracy > 0.7
    assert result.ema_accuracy is not None
    assert result.ema_accuracy > 0.7
    assert result.best_accuracy >= result.accuracy
    assert result.skipped_steps == 0
    assert not result.student.training
    assert (result.teacher is None) == (recipe == "plain")


def test_metrics_say_what_happened(tmp_path: Path):
    result = train("qfd", tmp_path, epochs=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["step"] for e in entries] == sorted(e["step"] for e in entries)
    assert {e["phase"] for e in entries} == {"teacher", "student"}
    assert entries[-1]["event"] == "end"
    assert entries[-1]["accuracy"] == result.accuracy
    assert entries[-1]["step"] == 18
    assert entries[-1]["epoch"] == 3
    evaluations = [e for e in entries if e["event"] == "evaluation"]
    assert [e["step"] for e in evaluations] == [4, 6, 12, 18]  # the end of the teacher's phase, then every epoch
    losses = [e for e in entries if e["event"] == "train"]
    assert {"loss", "lr", "loss/cross_entropy", "loss/quantized_features"} <= losses[-1].keys()


def test_evaluate_every_leaves_out_epochs_but_not_the_last(tmp_path: Path):
    train("plain", tmp_path, epochs=5, evaluate_every=2)
    steps = [r["step"] for r in read_metrics(tmp_path) if r["event"] == "evaluation"]
    assert steps == [12, 24, 30]


def test_two_runs_in_one_process_do_not_share_their_precision():
    exact = train("plain")
    train("plain", precision="bf16")
    again = train("plain")
    for one, two in zip(exact.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, two)


def rates(objective: Any, **settings: Any) -> dict[str, tuple[float, float]]:
    """Group name to learning rate and weight decay, as the optimizer really has them."""
    optimizer = make_optimizer(objective, Settings(lr=0.1, weight_decay=0.01, **settings))
    return {g["name"]: (pytest.approx(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups}


def objective_of(quantizer: str = "lsq", recipe: str = "plain", phase: int = 0) -> Any:
    student = quantize(network(0), weights=3, activations=3, quantizer=quantizer)
    images, _ = next(part_of_digits().train.batches(batch_size=8, normalisation=part_of_digits().normalisation))
    return make(recipe).objective(student, network(1), batches=[images], phase=phase)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_weights_decay(optimizer: Any):
    got = rates(objective_of(), optimizer=optimizer)
    assert got == {"student.weights": (0.1, 0.01), "student.no_decay": (0.1, 0.0), "student.quantizers": (0.1, 0.0)}


def test_the_alpha_of_pact_decays():
    objective = objective_of("pact")
    assert rates(objective)["student.quantizer_decayed"] == (0.1, 0.01)
    group = next(g for g in objective.param_groups(0.1, 0.01) if g["name"] == "student.quantizer_decayed")
    alphas = [p for n, p in objective.networks.student.named_parameters() if n.endswith(".alpha")]
    assert alphas
    assert {id(p) for p in group["params"]} == {id(p) for p in alphas}


def test_the_rate_of_quantizers_reaches_the_optimizer():
    got = rates(objective_of("pact"), quantizer_lr=0.5)
    assert got["student.weights"][0] == 0.1
    assert got["student.quantizers"][0] == 0.05
    assert got["student.quantizer_decayed"][0] == 0.05


@pytest.mark.parametrize(("settings", "expected"), [({}, 0.001), ({"quantizer_lr": 0.5}, 0.0005)])
def test_the_interval_of_ewgs_has_its_paper_s_rate(settings: Any, expected: float):
    """Found: at the weights' own rate an 8-bit network fell from 99 % to guessing within an epoch."""
    objective = objective_of("ewgs")
    group = next(g for g in objective.param_groups(0.1) if g["name"] == "student.quantizers x0.01")
    names = {id(p): n for n, p in objective.networks.student.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in group["params"]} == {"lower", "upper", "output_scale"}
    assert rates(objective, **settings)["student.quantizers x0.01"] == (expected, 0.0)


def test_the_teacher_of_qfd_has_its_own_rates():
    got = rates(objective_of(recipe="qfd"), quantizer_lr=0.5)
    assert got == {
        "teacher.weights": (0.02, 0.01),
        "teacher.no_decay": (0.02, 0.0),
        "teacher.quantizers": (0.0001, 0.0),
    }


def test_every_trained_parameter_is_in_one_group():
    for quantizer in ("lsq", "pact", "dorefa", "ewgs"):
        objective = objective_of(quantizer)
        grouped = [id(p) for g in make_optimizer(objective, Settings()).param_groups for p in g["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in objective.networks.student.parameters()}


def test_a_quantizer_rate_of_zero_holds_the_steps():
    student = train("plain", quantizer_lr=0.0).student
    start = train("plain", lr=1e-12, weight_decay=0.0).student
    for one, two in zip(student.modules(), start.modules(), strict=True):
        if isinstance(one, Quantizer):
            for held, untouched in zip(one.parameters(), two.parameters(), strict=True):
                torch.testing.assert_close(held, untouched)


def test_frozen_parameters_of_the_user_stay_frozen():
    student = quantize(network(0), weights=3, activations=3)
    student.conv1.weight.requires_grad_(False)
    before = student.conv1.weight.clone()
    fit(student, recipe=make("plain"), data=part_of_digits(), progress=False, **SETTINGS)
    assert torch.equal(student.conv1.weight, before)
    assert not student.conv1.weight.requires_grad


def test_the_users_teacher_is_not_changed():
    teacher, student = network(1).train(), quantize(network(0), weights=3, activations=3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = fit(student, teacher, recipe=make("qfd"), data=part_of_digits(), progress=False, **SETTINGS)
    assert before.keys() == teacher.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())
    assert isinstance(result.teacher, nn.Module)
    assert result.teacher is not teacher


def test_steps_per_epoch_counts_whole_batches():
    assert steps_per_epoch(part_of_digits(num_train=100), Settings(batch_size=16)) == 6


def test_clipping_bounds_what_a_step_changes():
    free = train("float", epochs=1 / 6, clip_grad=None, warmup_steps=0)
    clipped = train("float", epochs=1 / 6, clip_grad=1e-3, warmup_steps=0, weight_decay=0.0)
    start = network(0)

    def moved(model: nn.Module) -> float:
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return float(torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm())

    # One step of Nesterov SGD from rest moves lr * (1 + momentum) * gradient.
    assert moved(clipped.student) == pytest.approx(0.05 * 1.9 * 1e-3, rel=1e-3)
    assert moved(free.student) > 10 * moved(clipped.student)


class Scale(nn.Module):
    """A helper that starts at random."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(10))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits * self.factor


@dataclass(frozen=True)
class Helped(Term):
    """A term whose helper is trained; two phases have one each, under two names."""

    name: ClassVar[str] = "helped"

    def logits(self) -> tuple[NetworkName, ...]:
        return ("student",)

    def helper(self, networks: Networks) -> nn.Module:
        return Scale()

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        assert helper is not None
        return nn.functional.cross_entropy(helper(step.logits["student"]), step.targets)


@dataclass(frozen=True)
class HelpedToo(Helped):
    name: ClassVar[str] = "helped_too"


@dataclass(frozen=True)
class Alternating:
    """Quantizes and does not, in turns: gates depend on the step, not on where a process began."""

    def at(self, progress: float) -> Precision:
        on = round(progress * 100) % 3 != 0
        return Precision(weights=on, activations=not on)


@dataclass(frozen=True)
class TwoPhases(Recipe):
    name: str = "two-phases"

    def phases(self) -> tuple[Phase, ...]:
        terms = (CrossEntropy(), Helped()), (CrossEntropy(), HelpedToo())
        return (
            Phase("first", 0.4, terms[0], precision=Alternating()),
            Phase("second", 0.6, terms[1], precision=Alternating()),
        )


def test_helpers_and_gates_of_later_phases_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Helpers of finished phases are still in the checkpoint; those of the next phase start at random."""

    def run(folder: Path, resume: bool = False) -> None:
        student = quantize(network(0, dropout=0.2), weights=3, activations=3)
        torch.seed()  # nothing may depend on the state that a process starts with
        common = {**SETTINGS, "checkpoint_seconds": 0, "progress": False}
        fit(student, recipe=TwoPhases(), data=part_of_digits(), output=folder, resume=resume, **common)

    run(tmp_path / "whole")
    for save in range(1, NUM_STEPS + 1):
        folder = tmp_path / f"stopped-{save}"
        with stopped_at(monkeypatch, save, written=True):
            run(folder)
        run(folder, resume=True)
        same_run(tmp_path / "whole", folder)
