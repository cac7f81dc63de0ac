"""The compiled objective: what ``torch.compile`` may fuse, and what it computes again instead of keeping it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..quantizers import graph


def compiled(objective: Any) -> Any:
    """The objective, or its forward pass, as one graph that fuses quantizing and never keeps what it quantized.

    LSQ is an expression of single elements: the compiler writes it into the loops before or behind it. So it may be
    computed again in the backward pass for nothing, where a convolution's gradient needs its quantized input. There a
    quantizer's gradient is written into the loops around it only if the compiler lets expressions grow longer than it
    does by default: cut in two, each is a pass over memory.
    """
    # Progressive precision compiles once per width; the default limit of 8 is for other uses.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    options: dict[str, Any] = {
        "joint_custom_post_pass": _quantize_again(),
        "realize_reads_threshold": 8,  # scalars such as steps and gates count, too
        "realize_opcount_threshold": 60,
        **graph.OPTIONS,
    }
    return torch.compile(objective, fullgraph=True, options=options)


def _quantize_again() -> Any:
    """A pass over the graph of forward and backward, before it is cut in two."""
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    class QuantizeAgain(CustomGraphPass):
        def __call__(self, joint: fx.Graph) -> None:
            for node in joint.nodes:
                if node.target is graph.LSQ:
                    # One region for all of them: at a border between two, a value would be kept after all.
                    node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 0}

        def uuid(self) -> str:
            # Part of the key of compiled graphs on disk, which hold what this file told the compiler.
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return QuantizeAgain()
