"""The house recipe: what earned its place under one budget, and nothing that did not; no paper's own method.

Chosen among all recipes and three sums of them on binary ResNet-20 (benchmarks/methods.py; README, What each mechanism
adds). It is the block losses of DGRL (reconstruction, see ``blockwise``) at the strength that served best, without a
schedule and without distilled logits, which took away more than they added on top.
"""

from __future__ import annotations

from ..checks import NonNegative, checked
from ..distill import CrossEntropy
from .base import Recipe
from .blockwise import BlockDistance
from .teacher import Frozen


@checked
def Best(beta: NonNegative = 10.0) -> Recipe:
    """The house recipe: CE + beta * sum over residual blocks of the mean squared distance to the teacher's.

    It changes nothing in the network and runs at any width, but was measured at 1/1 alone. There most comes from its
    meeting with DGRL's float branch, which the network has to bring along: ``--blocks bireal+prelu+bottleneck``.

    Args:
        beta: of the block losses.
    """
    return Recipe("best", (CrossEntropy(), BlockDistance(beta)), Frozen())
