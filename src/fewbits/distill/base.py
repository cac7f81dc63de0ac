"""The types that carry a method: networks, taps, loss terms, edits of structure, phases of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..checks import Checked, NonNegative, Part
from ..precision import Fixed, PrecisionSchedule

FULLY_QUANTIZED = Fixed()

NetworkName = Literal["student", "teacher"]
Routing = Literal["through", "detached", "teacher_input"]


class Networks(nn.Module):
    """Everything that lives through a run: student, teacher or None, and the modules that a method trains.

    Helpers have names that last across phases and never enter the student's ``state_dict``.

    Args:
        student: the network that is trained and shipped.
        teacher: the float network that teaches it, if any.
        example: a few images, N x C x H x W, normalised; they give helpers their shapes.
        anatomies: where the parts of a network are, for those whose names do not tell.
        source: the teacher as it came, where ``teacher`` is a copy that a phase changes.
    """

    example: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        example: Tensor,
        anatomies: Mapping[NetworkName, Anatomy] | None = None,
        source: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.helpers = nn.ModuleDict()
        self.register_buffer("example", example, persistent=False)
        self.images: list[Tensor] = []
        """Batches that an objective being made sets ranges from; none on resume, where ranges are loaded."""
        self.num_phases = 0
        """Phases begun so far; their edits are in place."""
        self.holders: list[Any] = []
        """The objective at work, in a list: a module would become a part. The next one closes it."""
        self._source = (source,)  # in a tuple: it is the caller's, and no part of a run's state
        self._anatomies = dict(anatomies or {})
        for name, anatomy in self._anatomies.items():
            _check_parts(self.network(name), name, anatomy)

    def network(self, name: NetworkName) -> nn.Module:
        """The student or the teacher.

        Raises:
            ValueError: there is no teacher.
        """
        if name == "student":
            return self.student
        if self.teacher is None:
            raise ValueError(
                "this recipe needs a teacher; pass teacher=..., the float network that the student came from"
            )
        return self.teacher

    @property
    def source(self) -> nn.Module:
        """The teacher as it came, whatever phases have made of it since."""
        return self._source[0] or self.network("teacher")

    def report(self) -> dict[str, float]:
        """What modules know beside the losses, by qualified name: of each the scalars that its ``reported`` names."""
        return {
            f"{path}.{name}".removeprefix("helpers."): float(getattr(module, name).detach())
            for path, module in self.named_modules()
            for name in getattr(module, "reported", ())
        }

    def anatomy(self, name: NetworkName) -> Anatomy:
        """Where the parts of a network are: as the user said, else read off the network."""
        return self._anatomies.get(name) or Anatomy.of(self.network(name))


def _check_parts(network: nn.Module, name: NetworkName, anatomy: Anatomy) -> None:
    modules = dict(network.named_modules())
    for part in (*anatomy.stages, *anatomy.blocks, anatomy.head):
        if part not in modules:
            raise ValueError(f"anatomy names {part!r}, but the {name} has no such module; see model.named_modules()")


@dataclass(frozen=True)
class Tap:
    """One tensor inside a network: what a module takes, or what it gives."""

    network: NetworkName
    module: str
    side: Literal["input", "output"]

    @classmethod
    def feature(cls, networks: Networks, network: NetworkName) -> Tap:
        """What enters the head: the vector behind the pooling, N x D."""
        return cls(network, networks.anatomy(network).head, "input")


@dataclass(frozen=True)
class Step:
    """What one forward pass gave: targets, logits and tapped features of the networks that ran."""

    targets: Any
    logits: Mapping[str, Tensor]
    features: Mapping[Tap, Tensor]

    def seen_by(self, taught: NetworkName) -> Step:
        """The same step with everything of the other network detached: each side is a constant to the other."""
        return Step(
            self.targets,
            {name: value if name == taught else value.detach() for name, value in self.logits.items()},
            {tap: value if tap.network == taught else value.detach() for tap, value in self.features.items()},
        )


@dataclass(frozen=True)
class Term(Checked):
    """One summand of the loss. Frozen data; a subclass adds its settings and its formula.

    Args:
        weight: what the term is multiplied by.
        teaches: the network that its gradient reaches; the other one is a constant to it.
    """

    weight: NonNegative = 1.0
    teaches: NetworkName = "student"

    name: ClassVar[str]

    sets_weight_decay: ClassVar[bool] = False
    """Whether the term draws weights somewhere itself, in place of the run's weight decay."""

    mirrors: ClassVar[bool] = True
    """Whether the term has another side, which a teacher that is trained along learns: both networks exchanged."""

    fixes_teacher: ClassVar[bool] = False
    """Whether the teacher has to stay the network that came: the term compares with what that computes."""

    keeps_source_classes: ClassVar[bool] = False
    """Whether the teacher has to keep its own label space, which may be another one than the data's."""

    def logits(self) -> tuple[NetworkName, ...]:
        """The networks whose logits are read."""
        return ()

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """The tensors that are read inside the networks."""
        return ()

    def helper(self, networks: Networks) -> nn.Module | None:
        """The module that the term trains along, if it has one."""
        return None

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """The loss, a scalar, before its weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class Edit(Checked):
    """A change of structure that a phase makes before it starts. Resume and export replay it."""

    reshapes: ClassVar[NetworkName | None] = None
    """The network whose ``state_dict`` gets other names or shapes; a run's student is rebuilt by those of its own."""

    def apply(self, networks: Networks) -> None:
        """Change the structure; the same call makes the same change."""
        raise NotImplementedError

    def initialise(self, networks: Networks, batches: Iterable[Tensor]) -> None:
        """Set values from real images; not repeated on resume, where they are loaded."""


@dataclass(frozen=True)
class Group(Checked):
    """Who is trained in a phase, and how fast.

    Args:
        network: the network.
        lr: factor on the run's learning rate.
        quantizer_lr: factor on top of it for steps, ranges and thresholds.
    """

    network: NetworkName = "student"
    lr: NonNegative = 1.0
    quantizer_lr: NonNegative = 1.0


@dataclass(frozen=True)
class Phase(Checked):
    """A stretch of training under one objective. Data without modules: compares and saves.

    Args:
        name: for logs.
        share: of the whole budget of steps, 0 to 1.
        terms: the loss.
        edits: structure, changed before it starts.
        trains: who is trained.
        precision: what is quantized when.
        routing: of gradients between the student's blocks, see ``distill.routing``.
    """

    name: str
    share: Part
    terms: tuple[Term, ...]
    edits: tuple[Edit, ...] = ()
    trains: tuple[Group, ...] = (Group(),)
    precision: PrecisionSchedule = FULLY_QUANTIZED
    routing: Routing = "through"


def feature_of(features: Tensor) -> Tensor:
    """A feature as N x D: a head that is a 1 x 1 convolution takes N x D x 1 x 1."""
    return torch.flatten(features, 1)
