"""The rivals of DTQ when a source network moves to a small target set: L2-SP and DELTA.

The third, L2 (plain fine-tuning with weight decay on everything, "L2-Q"), is ``plain``; "DTQ without attention" is
``DTQ(attention=False, beta=0)``. Forms as in the public code of DTQ and AFA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import NonNegative, checked
from ..distill import CrossEntropy, Edit, Networks, Step, Tap, Term
from ..distill.attentive import attended_distance
from ..distill.logit_losses import kl_divergence
from ..distill.weight_terms import HeadDecay, SourceDistance
from .base import Recipe, names_of
from .dtq import alignment_taps, map_shapes, pairs
from .teacher import Frozen

IMAGES = 64
"""Images that a channel's score is measured on: one forward pass of the teacher for each channel of each tap."""

SPREAD = 5.0
"""The scores, brought to mean 0 and deviation 1, are divided by this before the softmax."""


class _ChannelWeights(nn.Module):
    """One fixed weight for each channel of each tap; a tap's weights add up to 1. Uniform until they are measured."""

    def __init__(self, num_channels: Iterable[int]) -> None:
        super().__init__()
        self.num_taps = 0
        for number in num_channels:
            self.register_buffer(f"tap{self.num_taps}", torch.full((number,), 1 / number))
            self.num_taps += 1

    def of(self, tap: int) -> Tensor:
        """The weights of one tap, C."""
        return self.get_buffer(f"tap{tap}")


@dataclass(frozen=True)
class FixedAlignment(Term):
    """DELTA: squared distance of the aligned maps, each channel with a weight that is fixed for all images.

    0.5 sum over taps, images and channels of C w_c ||F_s,c - F_t,c||^2 / (H W); as in the code, not divided by the
    batch size: with the batch the weight of the term grows.
    """

    weight: NonNegative = 0.01
    modules: tuple[str, ...] | None = None

    name: ClassVar[str] = "delta"
    mirrors: ClassVar[bool] = False
    fixes_teacher: ClassVar[bool] = True

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """See ``alignment_taps``."""
        return alignment_taps(networks, self.modules)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See the class."""
        assert isinstance(helper, _ChannelWeights), "the recipe's edit makes the channel weights"
        return torch.stack(
            [
                attended_distance(student, teacher, helper.of(tap)) * len(student) / student[0, 0].numel()
                for tap, (student, teacher) in enumerate(pairs(step, taps))
            ]
        ).sum()


def channel_weights(scores_C: Tensor) -> Tensor:
    """softmax(zscore(scores) / 5), with the population's deviation; uniform where all scores are equal.

    >>> channel_weights(torch.tensor([2.0, 2.0])).tolist()
    [0.5, 0.5]
    """
    centred = scores_C - scores_C.mean()
    deviation = centred.square().mean().sqrt()
    return torch.softmax(centred / torch.where(deviation > 0, deviation, 1.0) / SPREAD, 0)


@dataclass(frozen=True)
class MeasureChannels(Edit):
    """Score the teacher's channels by how much its loss grows when one of them is set to zero.

    Reconstruction: the loss is the teacher's own, KL(all channels || without channel c) on its source classes; DELTA
    trains a classifier for the target classes on the fixed features first and takes its cross-entropy.

    Args:
        modules: as in ``FixedAlignment``.
        measure: False leaves the weights uniform, a simplification for networks of thousands of channels.
    """

    modules: tuple[str, ...] | None = None
    measure: bool = True

    def apply(self, networks: Networks) -> None:
        """Make room for the weights."""
        taps = alignment_taps(networks, self.modules)
        shapes = map_shapes(networks, taps[len(taps) // 2 :])
        weights = _ChannelWeights(shape[0] for shape in shapes)
        networks.helpers[FixedAlignment.name] = weights.to(networks.example.device)

    @torch.no_grad()
    def initialise(self, networks: Networks, batches: Iterable[Tensor]) -> None:
        """See the class; on the first images of ``batches``."""
        if not self.measure:
            return
        teacher = networks.network("teacher").eval()
        weights = networks.helpers[FixedAlignment.name]
        assert isinstance(weights, _ChannelWeights)
        images = next(iter(batches))[:IMAGES]
        whole = torch.flatten(teacher(images), 1)
        taps = alignment_taps(networks, self.modules)
        for number, tap in enumerate(taps[len(taps) // 2 :]):
            scores = [
                self._loss_without(channel, teacher, tap, images, whole) for channel in range(len(weights.of(number)))
            ]
            weights.of(number).copy_(channel_weights(torch.stack(scores)))

    @staticmethod
    def _loss_without(channel: int, teacher: nn.Module, tap: Tap, images: Tensor, whole: Tensor) -> Tensor:
        def silence(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            silent = output.clone()
            silent[:, channel] = 0
            return silent

        handle = teacher.get_submodule(tap.module).register_forward_hook(silence)
        try:
            return kl_divergence(whole, torch.flatten(teacher(images), 1))
        finally:
            handle.remove()


@checked
def L2SP(weight: NonNegative = 0.01, head_decay: NonNegative = 0.01) -> Recipe:
    """CE + weight * 0.5 ||w - w_source||^2 + head_decay * 0.5 ||w_head||^2 (Li et al., ICML 2018, arXiv 1802.01483).

    Args:
        weight: of the distance to the source weights, over everything but the classifier.
        head_decay: of the new classifier; there is no other weight decay.
    """
    return Recipe("l2-sp", (CrossEntropy(), SourceDistance(weight), HeadDecay(head_decay)), Frozen())


@checked
def DELTA(
    weight: NonNegative = 0.01,
    head_decay: NonNegative = 0.01,
    taps: str | Sequence[str] | None = None,
    measure: bool = True,
) -> Recipe:
    """CE + weight * alignment with fixed channel weights (Li et al., ICLR 2019, arXiv 1901.09229).

    Args:
        weight: of the alignment, see ``FixedAlignment``.
        head_decay: of the new classifier; there is no other weight decay.
        taps: names of the aligned modules, in both networks; None takes DTQ's.
        measure: False weights all channels alike instead of measuring them, see ``MeasureChannels``.
    """
    modules = None if taps is None else names_of(taps)
    terms = (CrossEntropy(), FixedAlignment(weight, modules=modules), HeadDecay(head_decay))
    return Recipe("delta", terms, Frozen(), edits=(MeasureChannels(modules, measure),))
