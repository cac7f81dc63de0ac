"""DTQ: deep transferring quantization (Xie et al., ECCV 2020; authors' code xiezheng-cs/DTQ).

A source network becomes a low-bit one on a small target set with other classes, in one stage. The student starts from
the source network and has a new classifier; the teacher is the source network itself, frozen, with its own classifier.
Its quantizer is ``minmax``. The factor of the alignment and the temperature are the code's; the paper has neither.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..checks import NonNegative, Positive, checked
from ..distill import CrossEntropy, Networks, Step, Tap, Term
from ..distill.attentive import AttentiveTransfer, attended_distance
from ..distill.base import NetworkName
from ..distill.logit_losses import kl_divergence
from ..distill.taps import Taps
from ..distill.terms import same_shape
from ..distill.weight_terms import HeadDecay
from ..streams import OUTPUT_STREAM
from .base import Recipe, names_of
from .teacher import Frozen

NUM_TAPS = 4

BOTTLENECKS = (
    ("features.5.conv.3", "features.9.conv.3", "features.13.conv.3", "features.17.conv.3"),
    ("blocks.2.1.bn3", "blocks.3.2.bn3", "blocks.4.2.bn3", "blocks.6.0.bn3"),
)
"""MobileNetV2's taps, the batch norms that end four linear bottlenecks: torchvision's names, then timm's."""

BESIDE = {"shortcut", "downsample", "se", "attn"}
"""Children of a block that are not on its main path."""


def alignment_points(network: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """The modules whose outputs are aligned.

    ResNets: the last convolution in the last block of each of the last four stages, so before its batch norm and the
    addition. MobileNetV2: the batch norm that ends the bottlenecks 5, 9, 13 and 17. Both are the authors' code.
    Reconstruction: the rule for ResNets serves all other networks, whose stages are searched whole where they have no
    blocks; without stages the last four convolutions are taken.

    Raises:
        ValueError: there is no convolution.
    """
    modules = dict(network.named_modules())
    for names in BOTTLENECKS:
        if all(isinstance(modules.get(name), nn.BatchNorm2d) for name in names):
            return names
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    points: list[str] = []
    for stage in anatomy.stages[-NUM_TAPS:]:
        blocks = [block for block in anatomy.blocks if block.startswith(f"{stage}.")]
        inside = f"{blocks[-1] if blocks else stage}."
        main = [name for name in convolutions if name.startswith(inside) and not BESIDE & set(name.split("."))]
        points += main[-1:]
    points = points or convolutions[-NUM_TAPS:]
    if not points:
        raise ValueError(f"{type(network).__name__} has no convolution to align; name modules that give maps in taps")
    return tuple(points)


def alignment_taps(networks: Networks, modules: tuple[str, ...] | None) -> tuple[Tap, ...]:
    """The student's taps, then the teacher's in the same order; ``modules`` by name, or by ``alignment_points``.

    An 8-bit quantizer of a residual stream that hangs on a tapped module comes behind the tap: features are aligned
    before any activation quantizer.
    """
    taps: dict[NetworkName, list[Tap]] = {}
    names: tuple[NetworkName, ...] = ("student", "teacher")
    for name in names:
        network = networks.network(name)
        points = modules or alignment_points(network, networks.anatomy(name))
        inside = dict(network.named_modules())
        taps[name] = [
            Tap(name, f"{point}.{OUTPUT_STREAM}", "input")
            if f"{point}.{OUTPUT_STREAM}" in inside
            else Tap(name, point, "output")
            for point in points
        ]
    if len(taps["student"]) != len(taps["teacher"]):
        raise ValueError(
            f"student and teacher have {len(taps['student'])} and {len(taps['teacher'])} places to align; name modules "
            "that both have in taps"
        )
    return (*taps["student"], *taps["teacher"])


@torch.no_grad()
def map_shapes(networks: Networks, taps: Sequence[Tap]) -> list[torch.Size]:
    """C x H x W of the teacher's ``taps``, found by running it on the example.

    Raises:
        ValueError: a tap gives something else than maps.
    """
    teacher = networks.network("teacher").eval()
    hooks = Taps(taps, networks.student, teacher)
    try:
        teacher(networks.example)
        features = hooks.collect()
    finally:
        hooks.remove()
    for tap in taps:
        if features[tap].ndim != 4:
            raise ValueError(
                f"taps must name modules that give maps, N x C x H x W; {tap.module} gives {tuple(features[tap].shape)}"
            )
    return [features[tap].shape[1:] for tap in taps]


def pairs(step: Step, taps: tuple[Tap, ...]) -> list[tuple[Tensor, Tensor]]:
    """The student's and the teacher's map at each place of ``alignment_taps``."""
    half = len(taps) // 2
    found = [(step.features[s], step.features[t]) for s, t in zip(taps[:half], taps[half:], strict=True)]
    for student, teacher in found:
        same_shape(student, teacher, "features")
    return found


@dataclass(frozen=True)
class AttentiveAlignment(Term):
    """AFA: squared distance at a few places, each channel weighted by an attention module of that place.

    The gradient reaches the student and the attention modules; the modules see the teacher's map alone.

    Args:
        modules: names of the aligned modules in both networks; None is ``alignment_points``.
        attention: False weights all channels alike: "DTQ w/o ATT".
    """

    weight: NonNegative = 0.01
    modules: tuple[str, ...] | None = None
    attention: bool = True

    name: ClassVar[str] = "alignment"
    mirrors: ClassVar[bool] = False
    fixes_teacher: ClassVar[bool] = True

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """See ``alignment_taps``."""
        return alignment_taps(networks, self.modules)

    def helper(self, networks: Networks) -> nn.Module | None:
        """One attention module for each place."""
        if not self.attention:
            return None
        taps = self.taps(networks)
        device = networks.example.device
        shapes = map_shapes(networks, taps[len(taps) // 2 :])
        return nn.ModuleList(AttentiveTransfer(*shape) for shape in shapes).to(device)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``attended_distance``; the sum over the places."""
        found = pairs(step, taps)
        if not isinstance(helper, nn.ModuleList):
            return torch.stack([attended_distance(student, teacher) for student, teacher in found]).sum()
        return torch.stack(
            [attended_distance(s, t, attend(t)) for (s, t), attend in zip(found, helper, strict=True)]
        ).sum()


@dataclass(frozen=True)
class SourceClasses(Term):
    """KL on the source classes: the source classifier reads the student's feature (paper Eq. 5; T is the code's).

    KL = T^2 mean KL(softmax(z_full / T) || softmax(z_low / T)), z_low = source head of what enters the student's head

    The classifier is a frozen, full-precision copy of the teacher's: no optimizer sees it.
    """

    weight: NonNegative = 0.5
    temperature: Positive = 30.0

    name: ClassVar[str] = "source_classes"
    mirrors: ClassVar[bool] = False
    fixes_teacher: ClassVar[bool] = True
    keeps_source_classes: ClassVar[bool] = True

    def logits(self) -> tuple[NetworkName, ...]:
        """The teacher's, over the source classes."""
        return ("teacher",)

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """What enters the student's head."""
        return (Tap.feature(networks, "student"),)

    def helper(self, networks: Networks) -> nn.Module:
        """The source classifier.

        Raises:
            ValueError: it takes another width than the student's feature has.
        """
        heads = [networks.network(n).get_submodule(networks.anatomy(n).head) for n in ("student", "teacher")]
        widths = [head.weight.shape[1] for head in heads]  # type: ignore[index]
        if widths[0] != widths[1]:
            raise ValueError(
                f"the source classifier takes {widths[1]} features, the student has {widths[0]}; the student has to be "
                "of the teacher's architecture, or beta 0"
            )
        return copy.deepcopy(heads[1]).requires_grad_(False)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``kl_divergence``."""
        assert helper is not None
        logits = torch.flatten(helper(step.features[taps[0]]), 1)
        return kl_divergence(torch.flatten(step.logits["teacher"], 1), logits, self.temperature)


@checked
def DTQ(
    alpha: NonNegative = 0.01,
    beta: NonNegative = 0.5,
    temperature: Positive = 30.0,
    taps: str | Sequence[str] | None = None,
    attention: bool = True,
    head_decay: NonNegative = 1e-4,
) -> Recipe:
    """CE on the target classes + alpha * attentive alignment + beta * KL on the source classes (paper Eq. 2).

    Pass the source network as teacher, and a student that started from it with a classifier for the target classes.
    The backbone has no weight decay, whatever the settings say.

    Args:
        alpha: of the alignment; 0.01 in the code, cross-validated for each data set in the paper. 0 leaves it out. The
            loss sums over pixels: tune it with the rate. On ResNet-20 at 32 x 32 its gradient was 20 times that of the
            cross-entropy at 0.01, and 2 times at 0.001; at the paper's rate of 0.01 the first just did not diverge.
        beta: of the KL, 0.5 in the paper. 0 leaves it out.
        temperature: of the KL: 30 in the code for MobileNetV2, 60 for ResNet-50; elsewhere unknown.
        taps: names of the aligned modules, in both networks; None finds them, see ``alignment_points``.
        attention: False weights all channels alike.
        head_decay: weight decay of the target classifier, 1e-4 in the code.
    """
    terms: list[Term] = [CrossEntropy()]
    if alpha:
        modules = None if taps is None else names_of(taps)
        terms.append(AttentiveAlignment(alpha, modules=modules, attention=attention))
    if beta:
        terms.append(SourceClasses(beta, temperature=temperature))
    return Recipe("dtq", (*terms, HeadDecay(head_decay)), Frozen())
