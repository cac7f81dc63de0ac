"""Products of whole numbers in the place of products of what LSQ quantized, in a graph before it is compiled.

Everything that oneDNN's kernels could not take is looked for here (quantizers/integer_products.py says why), so that
neither layers nor quantizers know of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..quantizers import graph, integer_products

_ATEN = torch.ops.aten
_MANY_ROWS = 64
"""Of a matrix, so that packing the other one is worth its time."""


def multiply_integers(joint: fx.Graph) -> None:
    """Change the forward products of a graph of forward and backward, where whole numbers are right and faster."""
    ways = {_ATEN.convolution.default: _convolve, _ATEN.addmm.default: _multiply, _ATEN.mm.default: _multiply}
    for target, way in ways.items():
        for node in joint.find_nodes(op="call_function", target=target):
            way(node)


def _convolve(node: Any) -> None:
    """A convolution."""
    x, weight, bias, *place, is_transposed, _, groups = node.args
    y = node.meta["val"]
    if not _have_codes(x, weight) or y.ndim != 4 or is_transposed or groups != 1:
        return
    if not integer_products.takes(*(each.meta["val"].shape for each in (x, weight)), *place):
        return
    if all(each.meta["val"].is_contiguous(memory_format=torch.channels_last) for each in (x.args[0], node)):
        _replace(node, x, weight, bias, place)


def _multiply(node: Any) -> None:
    """A matrix times a layer's weight, and its bias."""
    *bias, rows, columns = node.args
    x, views = rows, []
    while x.target is _ATEN.view.default:
        views.append(x)
        x = x.args[0]
    is_weight = columns.target is _ATEN.permute.default and [*columns.args[1]] == [1, 0]
    if node.kwargs or not is_weight or not _have_codes(x, columns.args[0]):
        return
    if len(columns.meta["val"]) > integer_products.MOST_TERMS or len(rows.meta["val"]) < _MANY_ROWS:
        return
    if all(each.meta["val"].is_contiguous() for each in (rows, x)):
        _replace(node, x, columns.args[0], bias[0] if bias else None, views=views[::-1])


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


def _replace(
    node: fx.Node, x: Any, weight: Any, bias: Any, place: Sequence[Any] = (), views: Sequence[Any] = ()
) -> None:
    """A convolution has a ``place``; ``views`` make the matrix of ``x``, if that has more dimensions."""
    source, step, low, high, _ = x.args
    joint = node.graph
    with joint.inserting_before(node):
        codes = joint.call_function(graph.LSQ_CODES, (source, step, low, high))
        codes.meta = _as_bytes(x)
        for view in views:
            codes = joint.call_function(view.target, (codes, *view.args[1:]))
            codes.meta = _as_bytes(view)
        target = integer_products.INTEGER_CONVOLUTION if place else integer_products.INTEGER_LINEAR
        whole = joint.call_function(target, (codes, step, low, *weight.args[:-1], bias, *place))
        whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    joint.erase_node(node)


def _as_bytes(node: Any) -> dict[str, Any]:
    return {**node.meta, "val": torch.empty_like(node.meta["val"], dtype=torch.uint8)}


def _are_bytes(low: Any, high: Any, lowest: int | None = None) -> bool:
    """Whether there are at most 256 codes from ``low`` to ``high``, the first not below ``lowest``."""
    ends = [each.args[1] for each in (low, high) if each.target is _ATEN.full.default]
    if len(ends) == 2:
        return (lowest is None or ends[0] >= lowest) and ends[1] <= (ends[0] if lowest is None else lowest) + 255
    return lowest is None and high.target is _ATEN.add.Tensor and high.args[0] is low and high.args[1] in range(256)
