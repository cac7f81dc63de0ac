"""The objective: images and labels in, losses out. What a loop compiles, distributes and steps, and all it needs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..checks import NonNegative, UnitInterval, checked
from ..precision import Precision, draw_precision, fragments_of, is_fully_quantized, set_precision
from ..quantizers import Quantizer
from .base import Group, NetworkName, Networks, Phase, Step, Tap, Term
from .parameters import by_kind
from .routing import BlockInputs
from .taps import Taps


class Losses(NamedTuple):
    """What one batch cost.

    Args:
        total: the weighted sum, a scalar with a gradient.
        terms: each term by name, unweighted, detached.
        logits: of the network that is trained, detached, N x C.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Objective(nn.Module):
    """``objective(images, targets)`` runs the networks that its terms read, and no others.

    A network that this phase does not train stays in eval mode and gets no gradient.

    Args:
        networks: student, teacher and helpers; the phase's edits have been applied.
        phase: the terms, and who is trained.
        seed: of what a schedule draws.

    Attributes:
        teacher_dtype: bfloat16 lets a frozen teacher compute in it (autocast), whatever the student does; its answers
            are float32. None, the default, leaves it to whoever calls. Not where the student's blocks take what the
            teacher's took.
    """

    def __init__(self, networks: Networks, phase: Phase, seed: int = 0) -> None:
        super().__init__()
        # Whatever the phase before froze may be trained now.
        for holder in list(networks.holders):
            holder.close()
        self.networks = networks
        self.phase = phase
        self.seed = seed
        self.teacher_dtype: torch.dtype | None = None
        self._precision: Precision | None = None
        self._fragments: list[list[Quantizer]] | None = None
        self._names = _unique_names(phase.terms)
        self._taps: dict[str, tuple[Tap, ...]] = {}
        self._runs: set[NetworkName] = {group.network for group in phase.trains}
        for name, term in self._names.items():
            self._taps[name] = term.taps(networks)
            self._runs |= {*term.logits(), *(tap.network for tap in self._taps[name])}
            helper = term.helper(networks)
            if helper is not None and name not in networks.helpers:
                networks.helpers[name] = helper
        if phase.routing == "teacher_input":
            self._runs.add("teacher")
        self._trained: set[NetworkName] = {group.network for group in phase.trains}
        for network in self._runs:
            networks.network(network)
        for network in self._trained:
            _check_trainable(networks.network(network), network)
        self._asked = self._questions()
        self._block_inputs = BlockInputs(phase.routing, networks)
        self._hooks = Taps([tap for taps in self._taps.values() for tap in taps], networks.student, networks.teacher)
        self._frozen = self._freeze()
        networks.holders.append(self)
        self.set_progress(0.0, 0)
        self.train()
        try:
            self._try_out()
        except BaseException:
            self.close()  # the networks are the caller's: no hook and no frozen parameter stays behind
            raise

    @property
    def taught(self) -> nn.Module:
        """The network whose accuracy this phase is about."""
        return self.networks.network(self._taught)

    @property
    def _taught(self) -> NetworkName:
        return "student" if "student" in self._trained else "teacher"

    def forward(self, images: Tensor, targets: Any, answers: tuple[Tensor, ...] = ()) -> Losses:
        """Losses of one batch.

        Args:
            images: N x C x H x W, normalised.
            targets: labels, int64, N.
            answers: of the teacher to these images, see ``teach``, so that it need not run; by default it runs.
        """
        values, logits = self.terms(images, targets, answers)
        total = torch.stack([self._names[name].weight * value for name, value in values.items()]).sum()
        return Losses(total, {name: value.detach() for name, value in values.items()}, logits[self._taught].detach())

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of what the terms read of a teacher whose answers depend on the images alone; else none.

        There are none without a teacher, with one that is trained along, and where the student's blocks take what the
        teacher's took.
        """
        return tuple("logits" if asked == "logits" else f"{asked.module}.{asked.side}" for asked in self._asked)

    def _questions(self) -> tuple[Tap | Literal["logits"], ...]:
        if "teacher" not in self._runs - self._trained or self.phase.routing == "teacher_input":
            return ()
        of_logits = any("teacher" in term.logits() for term in self._names.values())
        tapped = (tap for taps in self._taps.values() for tap in taps if tap.network == "teacher")
        return (*(("logits",) if of_logits else ()), *dict.fromkeys(tapped))

    @torch.no_grad()
    def teach(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the teacher answers: one tensor for each of ``answers``, to be kept and given to ``forward`` again.

        Args:
            images: N x C x H x W, normalised.

        Returns:
            Tensors whose first dimension is N.
        """
        logits = self._answer(images)
        given: dict[Any, Tensor] = {"logits": logits, **self._collect()}
        return tuple(given[asked] for asked in self._asked)

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Tensor:
        """The frozen teacher's logits; its taps keep the rest."""
        teacher = self.networks.network("teacher")
        if not self._has_own_precision():
            return cast(Tensor, teacher(images))
        with torch.autocast(images.device.type, self.teacher_dtype):
            return cast(Tensor, teacher(images).float())

    def _has_own_precision(self) -> bool:
        is_frozen = "teacher" not in self._trained
        return self.teacher_dtype is not None and is_frozen and self.phase.routing != "teacher_input"

    def _collect(self) -> dict[Any, Tensor]:
        """What the taps kept; a teacher of its own precision is none of the losses' business."""
        kept: dict[Any, Tensor] = {**self._hooks.collect()}
        if not self._has_own_precision():
            return kept
        return {tap: value.float() if tap.network == "teacher" else value for tap, value in kept.items()}

    def terms(
        self, images: Tensor, targets: Any, answers: tuple[Tensor, ...] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term by name, unweighted, with its gradient; and the logits of the networks that ran."""
        logits: dict[str, Tensor] = {}
        with self._block_inputs.exchanged():
            if "teacher" in self._runs and not answers:
                is_trained = "teacher" in self._trained
                logits["teacher"] = self.networks.network("teacher")(images) if is_trained else self._answer(images)
            if "student" in self._runs:
                logits["student"] = self.networks.student(images)
        for name, given in logits.items():
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"the {name} must return its logits, a tensor N x C, got {type(given).__name__}; wrap it in a "
                    "module that returns them alone"
                )
        features = self._collect()
        if answers:
            features |= dict(zip(self._asked, answers, strict=True))
            if "logits" in features:
                logits["teacher"] = features.pop("logits")
        step = Step(targets, logits, features)
        return {name: self._value(name, term, step) for name, term in self._names.items()}, logits

    def _value(self, name: str, term: Term, step: Step) -> Tensor:
        # A ModuleDict has no get().
        helper = self.networks.helpers[name] if name in self.networks.helpers else None  # noqa: SIM401
        return term(step.seen_by(term.teaches), self._taps[name], helper)

    @checked
    def param_groups(
        self, lr: NonNegative, weight_decay: NonNegative = 0.0, helper_lr: NonNegative | None = None
    ) -> list[dict[str, Any]]:
        """Parameters for an optimizer, helpers included, each once.

        Matrices and kernels decay; biases, norms and quantizers do not, unless their paper says so (PACT's alpha). A
        term that draws the weights somewhere itself takes the place of their decay.

        Args:
            lr: of the weights; a phase's groups multiply it.
            weight_decay: L2 penalty.
            helper_lr: of the helpers, by default ``lr``.
        """
        groups: list[dict[str, Any]] = []
        drawn = {term.teaches for term in self._names.values() if term.sets_weight_decay}
        for group in self.phase.trains:
            network = self.networks.network(group.network)
            rate = lr * group.lr
            for (kind, own_rate), params in by_kind(network).items():
                is_quantizer = kind.startswith("quantizer")
                kind_lr = rate * own_rate * (group.quantizer_lr if is_quantizer else 1)
                decays = kind == "quantizer_decayed" or (kind == "weights" and group.network not in drawn)
                decay = weight_decay if decays else 0.0
                name = f"{group.network}.{kind}" + (f" x{own_rate:g}" if own_rate != 1 else "")
                groups.append({"name": name, "params": params, "lr": kind_lr, "weight_decay": decay})
        helpers = [p for p in self.networks.helpers.parameters() if p.requires_grad]
        groups.append(
            {"name": "helpers", "params": helpers, "lr": lr if helper_lr is None else helper_lr, "weight_decay": 0.0}
        )
        return [group for group in groups if group["params"]]

    @checked
    def set_progress(self, progress: UnitInterval, step: int) -> None:
        """Move the schedules: ``progress`` from 0 to 1 through this phase, ``step`` counts the run's steps."""
        precision = self.phase.precision.at(progress)
        student = self.networks.student
        if precision != self._precision:
            set_precision(student, precision)
            self._precision = precision
        if precision.probability < 1:
            if self._fragments is None:
                self._fragments = fragments_of(student, self.networks.anatomy("student").blocks, precision.fragment)
            draw_precision(self._fragments, precision, self.seed, step)

    @property
    def is_fully_quantized(self) -> bool:
        """Whether every gate is open, and no schedule closes one in the next step."""
        asked = self._precision
        is_steady = asked is not None and asked.weights and asked.activations and asked.probability >= 1
        return is_steady and is_fully_quantized(self)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what is trained; a network that is not stays in eval mode."""
        super().train(mode)
        for name in ("student", "teacher"):
            network = getattr(self.networks, name)
            if network is not None and name not in self._trained:
                network.eval()
        return self

    def forget_features(self) -> None:
        """Drop what the taps kept of a forward pass that was not the objective's, an evaluation's say."""
        self._hooks.collect()

    def close(self) -> None:
        """Take the hooks off and give frozen networks their gradients back; the networks live on."""
        self._hooks.remove()
        self._block_inputs.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []  # a second call must not undo what the next objective freezes
        if self in self.networks.holders:
            self.networks.holders.remove(self)

    def _freeze(self) -> list[nn.Parameter]:
        frozen = []
        for name in ("student", "teacher"):
            network = getattr(self.networks, name)
            if network is not None and name not in self._trained:
                frozen += [p for p in network.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    @torch.no_grad()
    def _try_out(self) -> None:
        """Let every term meet real shapes once, so that a mismatch is an error now and not an hour from now."""
        was_training = self.training
        self.eval()
        images = self.networks.example
        try:
            self(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
        finally:
            self.train(was_training)


def _check_trainable(network: nn.Module, name: NetworkName) -> None:
    if not any(kind in ("weights", "no_decay") for kind, _ in by_kind(network)):
        raise ValueError(
            f"no weight of the {name} requires a gradient, so this phase would train nothing; call "
            f"{name}.requires_grad_(True) (quantize() keeps what the float network had)"
        )


def _unique_names(terms: tuple[Term, ...]) -> dict[str, Term]:
    if not terms:
        raise ValueError("terms is empty; a phase needs at least one loss term")
    names: dict[str, Term] = {}
    for term in terms:
        name = term.name if term.teaches == "student" else f"{term.teaches}_{term.name}"
        while name in names:
            name += "_more"
        names[name] = term
    return names


__all__ = ["Group", "Losses", "Objective"]
