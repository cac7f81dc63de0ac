"""Activation checkpointing: a block keeps its input alone, and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..distill import Objective
from .evaluate import BATCH_NORMS


class CheckpointedBlocks:
    """The residual blocks of the networks that an objective trains, checkpointed until ``undo``.

    The same gradients to the bit: dropout draws what it drew, and batch norm counts the second run for nothing.

    Args:
        objective: changed in place.

    Raises:
        ValueError: a trained network has no blocks that could be found.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._blocks: list[nn.Module] = []
        for group in objective.phase.trains:
            names = objective.networks.anatomy(group.network).blocks
            if not names:
                raise ValueError(
                    f"checkpoint_blocks needs residual blocks, and none were found in the {group.network}; name them "
                    "with anatomy=Anatomy(stages=..., blocks=..., head=...), or leave it out"
                )
            network = objective.networks.network(group.network)
            self._blocks += [network.get_submodule(name) for name in names]
        for block in self._blocks:
            block.forward = _Checkpointed(block)

    def forget(self) -> None:
        """After a backward pass: what taps inside the blocks saw when these ran again is nobody's."""
        self._objective.forget_features()

    def undo(self) -> None:
        """Give the blocks their own forward back."""
        for block in self._blocks:
            own = block.__dict__.pop("forward").own
            if own is not None:
                block.forward = own
        self._blocks = []


class _Checkpointed:
    """A block's forward that runs it under ``checkpoint``, where there is a gradient to come."""

    def __init__(self, block: nn.Module) -> None:
        self._block, self._forward = block, block.forward
        self.own = block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _averages_stay(self._block)


@contextmanager
def _averages_stay(block: nn.Module) -> Iterator[None]:
    """Batch norm still normalises by its batch, but does not take it into its running averages a second time."""
    norms = [m for m in block.modules() if isinstance(m, BATCH_NORMS) and m.training and m.track_running_stats]
    averages = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm in norms:
        for name, average in norm.named_buffers(recurse=False):
            setattr(norm, name, average.clone())
    try:
        yield
    finally:
        for norm, kept in zip(norms, averages, strict=True):
            for name, average in kept.items():
                setattr(norm, name, average)
