"""QFD: quantized feature distillation (Zhu et al., AAAI 2023).

Certain are the idea and lambda = 0.5: train a float teacher whose output feature is quantized, then let the student
match that feature. Reconstruction: the quantizer, where the feature is taken (behind the pooling by default), the
reduction, the teacher's schedule and the number of bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..checks import Bits, Inside, NonNegative, checked
from ..distill import CrossEntropy, Edit, Group, Networks, Phase, Step, Tap, Term
from ..distill.feature_losses import Reduction, squared_error
from ..distill.terms import map_tap, same_shape
from ..quantizers.feature import FeatureQuantizer
from .base import Recipe
from .teacher import Frozen, TeacherPolicy

QUANTIZER = "feature_quantizer"
WIDE = 256
"""Features at least this wide keep a teacher's accuracy with one bit; rounding alone costs 2.5 points at 64."""


def quantizer_tap(networks: Networks) -> Tap:
    """The teacher's quantized feature: what its quantizer gives to the head, or to the pooling before it."""
    names = [name for name, _ in networks.network("teacher").named_modules() if name.rpartition(".")[2] == QUANTIZER]
    if not names:
        raise ValueError("the teacher's feature is not quantized; a QuantizeFeature edit does it, see the recipe QFD")
    return Tap("teacher", names[0], "output")


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_submodule(QUANTIZER)(args[0]), *args[1:])


def _quantize_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    quantized: Tensor = module.get_submodule(QUANTIZER)(output)
    return quantized


@dataclass(frozen=True)
class QuantizeFeature(Edit):
    """Put a quantizer between the teacher's feature and its head: the head consumes f_Q.

    Args:
        bits: of the feature; None chooses 1 for features of 256 dimensions or more, else 4.
        pooled: False quantizes the map before the pooling, and the head consumes the pooled f_Q.
    """

    bits: Bits | None = None
    pooled: bool = True

    def apply(self, networks: Networks) -> None:
        """See the class."""
        teacher = networks.network("teacher")
        head = teacher.get_submodule(networks.anatomy("teacher").head)
        if any(name.rpartition(".")[2] == QUANTIZER for name, _ in teacher.named_modules()):
            raise ValueError("the teacher's feature is quantized already; pass the float network as teacher")
        width = head.in_features if isinstance(head, nn.Linear) else head.in_channels
        bits = self.bits or (1 if int(width) >= WIDE else 4)  # type: ignore[arg-type]
        device = next(teacher.parameters()).device
        holder = head if self.pooled else teacher.get_submodule(map_tap(networks, "teacher").module)
        holder.add_module(QUANTIZER, FeatureQuantizer(bits).to(device))
        if self.pooled:
            holder.register_forward_pre_hook(_quantize_input)
        else:
            holder.register_forward_hook(_quantize_output)

    @torch.no_grad()
    def initialise(self, networks: Networks, batches: Iterable[Tensor]) -> None:
        """Set the range from the float teacher's features on real images."""
        teacher = networks.network("teacher").eval()
        tap = quantizer_tap(networks)
        quantizer = teacher.get_submodule(tap.module)
        assert isinstance(quantizer, FeatureQuantizer)
        features: list[Tensor] = []
        handle = quantizer.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
        try:
            for images in batches:
                teacher(images)
        finally:
            handle.remove()
        quantizer.calibrate(torch.cat(features))


@dataclass(frozen=True)
class QuantizedFeatureDistance(Term):
    """L(f_t_Q, f_s): squared error between the student's float feature and the teacher's quantized one.

    The student's feature passes no extra quantizer; the gradient reaches its own quantizers straight through.
    """

    weight: NonNegative = 0.5
    reduction: Reduction = "sum"
    pooled: bool = True

    name: ClassVar[str] = "quantized_features"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """What enters the student's head (or the pooling), and what leaves the teacher's feature quantizer."""
        return ((Tap.feature if self.pooled else map_tap)(networks, "student"), quantizer_tap(networks))

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See ``squared_error``."""
        student, teacher = (step.features[tap] for tap in taps)
        same_shape(student, teacher, "features")
        return squared_error(student, teacher, self.reduction)


@dataclass(frozen=True)
class QuantizedFeature(TeacherPolicy):
    """The teacher is trained first, with its feature quantized, then frozen.

    Args:
        bits: see ``QuantizeFeature``.
        share: of the whole budget of steps; reconstruction: 10 to 30 %.
        lr: factor on the run's learning rate.
        quantizer_lr: factor on top of it for the feature's range and scale, which drift otherwise.
        pooled: see ``QuantizeFeature``.
    """

    bits: Bits | None = None
    share: Inside = 0.2
    lr: NonNegative = 0.2
    quantizer_lr: NonNegative = 1e-2
    pooled: bool = True

    def phases(self) -> tuple[Phase, ...]:
        """One: cross-entropy through the quantized feature."""
        return (
            Phase(
                "teacher",
                self.share,
                (CrossEntropy(teaches="teacher"),),
                (QuantizeFeature(self.bits, self.pooled),),
                (Group("teacher", self.lr, self.quantizer_lr),),
            ),
        )


@checked
def QFD(
    weight: NonNegative = 0.5,
    bits: Bits | Literal[32] | None = None,
    reduction: Reduction = "sum",
    share: Annotated[Inside, "it is the teacher's part of the budget"] = 0.2,
    retrain: bool = True,
    teacher_lr: NonNegative = 0.2,
    pooled: bool = True,
) -> Recipe:
    """Teacher: CE through Q_b(f_t). Student: CE + weight * ||f_s - Q_b(f_t)||^2.

    Args:
        weight: lambda, 0.5 in the paper.
        bits: of the teacher's feature, 1 to 8, or 32 for a float feature (a teacher trained on without a quantizer is
            not needed then, and none is trained); None chooses by its width, see ``QuantizeFeature``.
        reduction: over the feature's elements, ``"sum"`` or ``"mean"``.
        share: of the budget that trains the teacher.
        retrain: False rounds the feature after training: the fair control, not QFD.
        teacher_lr: factor on the run's learning rate while the teacher trains; it starts from a trained network.
        pooled: False takes the map before the global pooling (all tokens of a transformer) in place of the vector
            behind it; a ``"sum"`` then runs over H x W times as many elements, 4,096 in place of 64 for ResNet-20.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.

    Transformers: every linear layer is quantized, products of two activations stay float (``fewbits summary`` lists
    them). In timm's ViT and Swin, ``keep=("*.attn",)`` or ``Rule("*.attn", ...)`` selects the attention layers (qkv and
    proj), ``"*.mlp"`` the MLP layers (fc1 and fc2), ``"*.downsample"`` Swin's patch merging.
    """
    if bits == 32:
        from .rivals import Features

        return Features(weight, reduction, pooled)
    terms = (CrossEntropy(), QuantizedFeatureDistance(weight, reduction=reduction, pooled=pooled))
    if not retrain:
        return Recipe("qfd-rounded", terms, Frozen(), edits=(QuantizeFeature(bits, pooled),))
    return Recipe("qfd", terms, QuantizedFeature(bits, share, teacher_lr, pooled=pooled))
