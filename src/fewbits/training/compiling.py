"""The compiled objective: what ``torch.compile`` may fuse, compute again, or compute otherwise than it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..quantizers import graph, integer_products

_ATEN = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_ELEMENTWISE = {
    *(_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor),
    *(_ATEN.relu.default, _ATEN.clamp_min.default, _ATEN.clamp.default, _CAST),
}
"""What stands between a norm and a quantizer, and costs less to compute again than to keep."""
_MANY_ROWS = 64
"""Of a matrix, so that packing the other one is worth its time."""


def compiled(objective: Any, *, recompute: bool = True) -> Any:
    """The objective, or its forward pass, as one graph that fuses quantizing and never keeps what it quantized.

    LSQ is an expression of single elements: the compiler writes it into the loops before or behind it. So it may be
    computed again in the backward pass for nothing, where a convolution's gradient needs its quantized input. There a
    quantizer's gradient is written into the loops around it only if the compiler lets expressions grow longer than it
    does by default: cut in two, each is a pass over memory.

    On a processor that multiplies bytes, and within ``gates.promised_open``, float32 convolutions and matrix
    products of what LSQ quantized are of whole numbers (quantizers/integer_products.py).

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
                for target, way in _PRODUCTS.items():
                    for node in joint.find_nodes(op="call_function", target=target):
                        way(node)
            for node in joint.find_nodes(op="call_function", target=graph.LSQ):
                casts = [user for user in node.users if recompute and user.target is _CAST]
                for each in (node, *casts, *_between_norm_and(node.args[0])):
                    # One region for all of them: at a border between two, a value would be kept after all.
                    each.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 0}

        def uuid(self) -> str:
            # Part of the key of compiled graphs on disk, which hold what these files told the compiler.
            files = b"".join(Path(file).read_bytes() for file in (__file__, graph.__file__, integer_products.__file__))
            return f"{hashlib.sha256(files).hexdigest()} {recompute} {has_integers}"

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


def _convolve_integers(node: Any) -> None:
    """Put a convolution of whole numbers in the place of one of values that LSQ quantized, where that is faster."""
    x, weight, bias, *place, is_transposed, _, groups = node.args
    y = node.meta["val"]
    if not _have_codes(x, weight) or y.ndim != 4 or is_transposed or groups != 1:
        return
    if not integer_products.takes(*(each.meta["val"].shape for each in (x, weight)), *place):
        return
    if all(each.meta["val"].is_contiguous(memory_format=torch.channels_last) for each in (x.args[0], node)):
        _replace(node, x, weight, bias, None, place)


def _multiply_integers(node: Any) -> None:
    """The same for a product of a matrix and a layer's weight."""
    *bias, x, weight = node.args
    rows = x
    while x.target in (_ATEN.view.default, _ATEN.reshape.default):
        x = x.args[0]
    is_weight = weight.target in (_ATEN.permute.default, _ATEN.t.default)
    if node.kwargs or not is_weight or not _have_codes(x, weight.args[0]):
        return
    if weight.meta["val"].shape[0] > integer_products.MOST_TERMS:
        return
    if rows.meta["val"].is_contiguous() and x.meta["val"].is_contiguous() and len(rows.meta["val"]) >= _MANY_ROWS:
        _replace(node, x, weight.args[0], bias[0] if bias else None, rows, [])


_PRODUCTS = {
    _ATEN.convolution.default: _convolve_integers,
    _ATEN.addmm.default: _multiply_integers,
    _ATEN.mm.default: _multiply_integers,
}


def _have_codes(x: Any, weight: Any) -> bool:
    """Whether both are what LSQ quantized, with gates open, to codes that are bytes."""
    if any(not isinstance(each, fx.Node) or each.target is not graph.LSQ for each in (x, weight)):
        return False
    (source, step, low, high, gate), (kernel, _, lowest, highest, weight_gate) = x.args, weight.args
    if gate is not None or weight_gate is not None:
        return False  # they say at each step whether there are codes
    values = [each.meta["val"] for each in (source, kernel)]
    # In bfloat16 bytes gain nothing: the product takes as long, and the loops around it longer.
    are_known = all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values)
    is_one_step = step.meta["val"].numel() == 1 and all(_has_gradient(each) for each in (x, weight))
    return are_known and is_one_step and _are_bytes(low, high) and _are_bytes(lowest, highest, lowest=-128)


def _has_gradient(quantized: Any) -> bool:
    """Whether its step has one, which shows a NaN that bytes would hide."""
    x, step, *_ = quantized.args
    made = (user for user in step.users if user.target is graph.LSQ_BACKWARD and user.args[0] is x)
    return any(part.args[1] == 1 and part.users for each in made for part in each.users)


def _replace(node: fx.Node, x: Any, weight: Any, bias: Any, rows: fx.Node | None, place: list[Any]) -> None:
    """``rows``: a matrix with the values of ``x``, if that has more dimensions."""
    source, step, low, high, _ = x.args
    joint = node.graph
    with joint.inserting_before(node):
        codes = joint.call_function(graph.LSQ_CODES, (source, step, low, high))
        codes.meta = {**x.meta, "val": torch.empty_like(source.meta["val"], dtype=torch.uint8)}
        if rows is not None and rows is not x:
            shape = [*rows.meta["val"].shape]
            codes = joint.call_function(_ATEN.view.default, (codes, shape))
            codes.meta = {**rows.meta, "val": torch.empty_like(rows.meta["val"], dtype=torch.uint8)}
        target = integer_products.INTEGER_CONVOLUTION if rows is None else integer_products.INTEGER_LINEAR
        whole = joint.call_function(target, (codes, step, low, *weight.args[:-1], bias, *place))
        whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    joint.erase_node(node)


def _are_bytes(low: Any, high: Any, lowest: int | None = None) -> bool:
    """Whether there are at most 256 codes from ``low`` to ``high``, the first not below ``lowest``."""
    ends = [each.args[1] for each in (low, high) if each.target is _ATEN.full.default]
    if len(ends) == 2:
        return (lowest is None or ends[0] >= lowest) and ends[1] <= (ends[0] if lowest is None else lowest) + 255
    return lowest is None and high.target is _ATEN.add.Tensor and high.args[0] is low and high.args[1] in range(256)
