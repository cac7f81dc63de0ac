"""Loss terms that read weights instead of what the networks compute: weight decay, and distance to the source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..checks import NonNegative
from .base import Networks, Step, Tap, Term


class _Place(NamedTuple):
    """Where a weight is. Asked each time: FSDP puts another tensor there while the weights are whole."""

    module: nn.Module
    name: str

    @classmethod
    def of(cls, network: nn.Module, name: str) -> Self:
        prefix, _, leaf = name.rpartition(".")
        return cls(network.get_submodule(prefix), leaf)

    def weight(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.name))


class _Drawn(nn.Module):
    """0.5 sum ||w - w0||^2 over pairs of a weight and where it is drawn to; None is the origin.

    The weights belong to the networks: their places are held in a tuple, which makes them no part of this module.
    """

    def __init__(self, pairs: Iterable[tuple[_Place, _Place | None]]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)

    def forward(self) -> Tensor:
        distances = [
            at.weight() if origin is None else at.weight() - origin.weight().detach() for at, origin in self.pairs
        ]
        return 0.5 * torch.stack([distance.float().square().sum() for distance in distances]).sum()


@dataclass(frozen=True)
class HeadDecay(Term):
    """0.5 ||w_head||^2 on the target classifier, its bias included: with SGD the same as a weight decay of ``weight``.

    The run's own weight decay then leaves the network alone (``sets_weight_decay``): DTQ, L2-SP and DELTA decay
    nothing but the new classifier.
    """

    weight: NonNegative = 1e-4

    name: ClassVar[str] = "head_decay"
    sets_weight_decay: ClassVar[bool] = True
    mirrors: ClassVar[bool] = False

    def helper(self, networks: Networks) -> nn.Module:
        """The weight and the bias of the head."""
        head = networks.network(self.teaches).get_submodule(networks.anatomy(self.teaches).head)
        return _Drawn((_Place(head, n), None) for n, _ in head.named_parameters() if n in ("weight", "bias"))

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See the class."""
        assert helper is not None
        return helper()


@dataclass(frozen=True)
class SourceDistance(Term):
    """0.5 sum ||w - w_source||^2 over everything but the classifier: L2-SP (Li et al., ICML 2018, arXiv 1802.01483).

    Latent weights, biases and batch norms of the student are compared with the teacher's of the same name: of the
    teacher as it came, also where it is trained.
    """

    weight: NonNegative = 0.01

    name: ClassVar[str] = "source_distance"
    sets_weight_decay: ClassVar[bool] = True
    mirrors: ClassVar[bool] = False

    def helper(self, networks: Networks) -> nn.Module:
        """Pairs of a student's and the teacher's weight.

        Raises:
            ValueError: a weight of the student's body has no counterpart of its name and shape.
        """
        source = dict(networks.source.named_parameters())
        heads = tuple(f"{networks.anatomy(name).head}." for name in ("student", "teacher"))
        own = {name: weight for name, weight in source.items() if not name.startswith(heads)}
        student = dict(networks.student.named_parameters())
        missing = [n for n, w in own.items() if n not in student or student[n].shape != w.shape]
        if missing or not own:
            raise ValueError(
                f"l2-sp compares weights by name, but the student has no {', '.join(missing[:3]) or 'such weight'} of "
                "the teacher's shape; the teacher must be the float network that the student started from"
            )
        return _Drawn((_Place.of(networks.student, name), _Place.of(networks.source, name)) for name in own)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See the class."""
        assert helper is not None
        return helper()
