"""The compiled objective: what ``torch.compile`` may fuse, or compute again instead of keeping it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..quantizers import graph, integer_products
from . import integer_graph

_ATEN = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_ELEMENTWISE = {
    *(_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor),
    *(_ATEN.relu.default, _ATEN.clamp_min.default, _ATEN.clamp.default, _CAST),
}
"""What stands between a norm and a quantizer, and costs less to compute again than to keep."""


def compiled(objective: Any, *, recompute: bool = True) -> Any:
    """The objective, or its forward pass, as one graph that fuses quantizing and never keeps what it quantized.

    LSQ is an expression of single elements: the compiler writes it into the loops before or behind it. So it may be
    computed again in the backward pass for nothing, where a convolution's gradient needs its quantized input. There a
    quantizer's gradient is written into the loops around it only if the compiler lets expressions grow longer than it
    does by default: cut in two, each is a pass over memory.

    On a processor that multiplies bytes, and within ``gates.promised_open``, float32 convolutions and matrix
    products of what LSQ quantized are of whole numbers (integer_graph.py).

    Args:
        objective: a module or a function.
        recompute: cast to half precision again, too, which saves as much memory and does cost time.
    """
    # Progressive precision compiles once per width; the default limit of 8 is for other uses.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    options: dict[str, Any] = {
        "joint_custom_post_pass": _make_pass(recompute, integer_products.is_available()),
        "realize_reads_threshold": 8,  # scalars such as steps and gates count, too
        "realize_opcount_threshold": 60,
        **graph.OPTIONS,
    }
    return torch.compile(objective, fullgraph=True, options=options)


def _make_pass(recompute: bool, has_integers: bool) -> Any:
    """A pass over the graph of forward and backward, before it is cut in two."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, joint: fx.Graph) -> None:
            if has_integers:
                integer_graph.multiply_integers(joint)
            for node in joint.find_nodes(op="call_function", target=graph.LSQ):
                casts = [user for user in node.users if recompute and user.target is _CAST]
                for each in (node, *casts, *_between_norm_and(node.args[0])):
                    # One region for all of them: at a border between two, a value would be kept after all.
                    each.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 0}

        def uuid(self) -> str:
            # Part of the key of compiled graphs on disk, which hold what these files told the compiler.
            files = (__file__, integer_graph.__file__, graph.__file__, integer_products.__file__)
            told = b"".join(Path(file).read_bytes() for file in files)
            return f"{hashlib.sha256(told).hexdigest()} {recompute} {has_integers}"

    return Pass()


def _between_norm_and(x: fx.Node) -> list[fx.Node]:
    """What lies between the tensor that a norm keeps for its own gradient and ``x``, element by element.

    A quantizer's gradient needs ``x``; the norm's, in the same loops, needs what ``x`` is made of.
    """
    found: list[fx.Node] = []
    shape = _shape(x)
    while x.target in _ELEMENTWISE:
        found.append(x)
        sources = [source for source in x.all_input_nodes if _shape(source) == shape]
        if len(sources) != 1:
            return []
        (x,) = sources
    readers = [reader for user in x.users for reader in (user.users if user.target is _CAST else (user,))]
    return found if any(reader.target is _ATEN.var_mean.correction for reader in readers) else []


def _shape(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None
