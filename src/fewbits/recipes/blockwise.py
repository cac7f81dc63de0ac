"""DGRL: distillation-guided residual learning for binary networks (Ye et al., arXiv 2007.05223; TNNLS 2021).

Certain, from the abstracts: each binary block is taught by a block-wise distillation loss from the full-precision
network, and a lightweight shortcut branch, Squeeze-and-Interaction, stands beside each binary convolution.
Reconstruction: the branch's layers, the formula and the gradient routing of the loss, the stages, the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..blocks import Activation, Branch, rewrite
from ..checks import Inside, NonNegative, PositiveInt, checked
from ..distill import CrossEntropy, Edit, Networks, Step, Tap, Term
from ..distill.base import NetworkName, Routing
from ..distill.feature_losses import normalised_squared_error, squared_attention_distance, squared_error
from ..distill.terms import other, same_shape
from ..precision import Fixed, Precision
from .base import Recipe
from .schedule import OneStage, Schedule, Stage
from .teacher import Frozen, NoTeacher

Distance = Literal["squared", "normalised", "attention"]
Stages = Literal["two", "one", "blocks_first"]
FirstShare = Annotated[Inside, "it is the first stage's part of the budget"]
ACTIVATIONS_ONLY = Fixed(Precision(weights=False))


@dataclass(frozen=True)
class BinaryBlocks(Edit):
    """Give the student double shortcuts and a branch beside each convolution; see ``fewbits.blocks.rewrite``.

    Args:
        branch: ``"bottleneck"`` (A), ``"squeeze"`` (B), ``"grouped"`` (C), or None.
        activation: behind each addition, ``"none"`` or ``"prelu"``; None keeps what is there, "none" in new blocks.
        reduction: of the branch's channels.
    """

    branch: Branch | None = "bottleneck"
    activation: Activation | None = None
    reduction: PositiveInt | None = None

    reshapes: ClassVar[NetworkName | None] = "student"

    def apply(self, networks: Networks) -> None:
        """See the class."""
        rewrite(networks.student, self.activation, self.branch, self.reduction)


class _Kept(nn.Module):
    """The last batch's loss of one block; of no use to training, so no part of a run's state."""

    loss: Tensor
    reported: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loss", torch.tensor(0.0), persistent=False)


@dataclass(frozen=True)
class BlockDistance(Term):
    """sum over blocks of the distance of the two networks' block outputs, behind the addition.

    ``"squared"``: mean over batch and elements of (F_t - F_s)^2; ``"normalised"``: || F_t/||F_t|| - F_s/||F_s|| ||^2,
    mean over the batch; ``"attention"``: Real-to-Binary's maps, see ``squared_attention_distance``.
    """

    distance: Distance = "squared"

    name: ClassVar[str] = "blocks"

    def taps(self, networks: Networks) -> tuple[Tap, ...]:
        """The blocks of the network that learns, then those of the other, by their outputs.

        Raises:
            ValueError: there are none, or not as many of them.
        """
        mine, theirs = (networks.anatomy(network).blocks for network in (self.teaches, other(self.teaches)))
        if not mine or len(mine) != len(theirs):
            raise ValueError(
                f"block losses pair residual blocks, but the {self.teaches} has {len(mine)} and the "
                f"{other(self.teaches)} {len(theirs)}; use networks of the same depth, or pass anatomy=Anatomy(...)"
            )
        return (
            *(Tap(self.teaches, block, "output") for block in mine),
            *(Tap(other(self.teaches), block, "output") for block in theirs),
        )

    def helper(self, networks: Networks) -> nn.Module:
        """What keeps each block's loss, for a run's records: one number for all would hide which block it is."""
        kept = {block.replace(".", "_"): _Kept() for block in networks.anatomy(self.teaches).blocks}
        return nn.ModuleDict(kept).to(networks.example.device)

    def __call__(self, step: Step, taps: tuple[Tap, ...], helper: nn.Module | None) -> Tensor:
        """See the class."""
        assert isinstance(helper, nn.ModuleDict)
        half = len(taps) // 2
        losses = [self._distance(step, *pair) for pair in zip(taps[:half], taps[half:], strict=True)]
        for kept, loss in zip(cast(Iterable[_Kept], helper.values()), losses, strict=True):
            kept.loss.copy_(loss.detach())
        return torch.stack(losses).sum()

    def _distance(self, step: Step, learner: Tap, fixed: Tap) -> Tensor:
        mine, theirs = step.features[learner], step.features[fixed]
        if self.distance == "attention":
            return squared_attention_distance(mine, theirs)
        same_shape(mine, theirs, f"outputs of block {learner.module}")
        if self.distance == "normalised":
            return normalised_squared_error(mine, theirs)
        return squared_error(mine, theirs, "mean")


@dataclass(frozen=True)
class BlockStages(Schedule):
    """The stages of block-wise training, and how gradients pass between blocks in them.

    Args:
        kind: see ``BlockWise``.
        routing: likewise; ``"blocks_first"`` ends end to end, with gradients through.
        share: of the student's budget that the first of two stages takes.
    """

    kind: Stages = "two"
    routing: Routing = "through"
    share: FirstShare = 0.5

    def stages(self) -> tuple[Stage, ...]:
        """One or two."""
        if self.kind == "one":
            return (Stage(routing=self.routing),)
        if self.kind == "two":
            first = Stage("activations", self.share, precision=ACTIVATIONS_ONLY, routing=self.routing)
            return (first, Stage("binary", 1.0 - self.share, routing=self.routing))
        return (
            Stage("blocks", self.share, routing=self.routing, labels=False),
            Stage("end-to-end", 1.0 - self.share),
        )


@checked
def BlockWise(
    beta: Annotated[NonNegative, "0 leaves the block losses out"] = 1.0,
    branch: Branch | None = "bottleneck",
    routing: Routing = "through",
    distance: Distance = "squared",
    stages: Stages = "two",
    activation: Activation | None = None,
    reduction: PositiveInt | None = None,
    share: FirstShare = 0.5,
) -> Recipe:
    """DGRL: CE + beta * sum over blocks of ||F_teacher - F_student||^2 / numel, a float branch in each binary block.

    The student is quantized at 1/1 (method bireal: mean|W| sign(W) by sign(x)); its blocks are rewritten. The controls:
    ``beta=0`` is the branch without distillation, ``branch=None`` distillation without the branch, both together the
    double-shortcut network alone, with the same stages and budget.

    Against a teacher with ReLU, ``routing="teacher_input"`` feeds values from zero up, whose signs say nothing: it asks
    for a teacher with the student's blocks and PReLU (``--blocks bireal+prelu``, recipe float), or for method react.

    Args:
        beta: of the block losses; 0 needs no teacher.
        branch: see ``fewbits.blocks.make_branch``; None adds none.
        routing: ``"through"`` (R1); ``"detached"`` (R2): no gradient passes a block's input, so that a block's loss
            trains that block alone, the cross-entropy the last block and the head, and nothing the stem;
            ``"teacher_input"``: R2 on the teacher's block inputs.
        distance: see ``BlockDistance``.
        stages: ``"two"``: binary activations and float weights, then both binary; ``"blocks_first"``: both binary,
            block losses only, then cross-entropy and block losses end to end; ``"one"``.
        activation: see ``BinaryBlocks``.
        reduction: of the branch's channels; 4 for bottleneck, 16 for squeeze.
        share: of the budget that the first of two stages takes.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or a routing without block losses.
    """
    if beta == 0 and (routing != "through" or stages == "blocks_first"):
        raise ValueError(
            "beta=0 leaves no block losses, which this routing or these stages live on; use routing='through' and "
            "stages 'two' or 'one'"
        )
    blocks = () if beta == 0 else (BlockDistance(beta, distance=distance),)
    is_plain = stages == "one" and routing == "through"
    return Recipe(
        "blockwise",
        (CrossEntropy(), *blocks),
        Frozen() if blocks else NoTeacher(),
        OneStage() if is_plain else BlockStages(stages, routing, share),
        (BinaryBlocks(branch, activation, reduction),),
    )
