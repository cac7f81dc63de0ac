"""Data movement happens on codes: DequantizeLinear is pushed behind what only moves, pads or compares values.

A slice, a zero padding or a max pooling between a DequantizeLinear and an addition would leave the addition's operand
in float, and ONNX Runtime would add in float. On codes the same operators move a quarter of the bytes, are exact, and
the DequantizeLinear stands directly in front of the addition.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .activations import GRID, Grid, dequantize
from .builder import Builder, array_of, producer, replace

MOVES = ("Slice", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Gather", "Expand")


def push_dequantize(builder: Builder) -> None:
    """Rewrite ``builder.graph`` until no DequantizeLinear of an activation stands in front of a move."""
    changed = True
    while changed:
        changed = False
        for node in list(builder.graph):
            if node.domain == "" and (node.op_type == "Concat" or node.inputs):
                changed = _push(builder, node) or changed


def _push(builder: Builder, node: ir.Node) -> bool:
    """Move the DequantizeLinear in front of ``node`` behind it, if that is exact."""
    sources = [_source(v) for v in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    found = [s for s in sources if s is not None]
    if not node.outputs[0].uses() or len(found) != len(sources) or len({grid for _, grid in found}) != 1:
        return False
    dequantizers, grid = [n for n, _ in found], found[0][1]
    codes = [n.inputs[0] for n in dequantizers]
    moved, grid = _on_codes(builder, node, codes, grid)
    if moved is None:
        return False
    scale = dequantizers[0].inputs[1]
    assert scale is not None
    result = dequantize(builder, moved, scale, grid)
    replace(node.outputs[0], result)
    builder.graph.remove(node, safe=True)
    return True


def _source(value: ir.Value | None) -> tuple[ir.Node, Grid] | None:
    node = producer(value, "DequantizeLinear")
    if node is None or value is None or GRID not in value.meta:
        return None
    return node, value.meta[GRID]


def _on_codes(
    builder: Builder, node: ir.Node, codes: list[ir.Value | None], grid: Grid
) -> tuple[ir.Value | None, Grid]:
    """``node`` on uint8 codes, and the range of its result; None where it would not be exact."""
    zero = grid.zero_point
    with_zero = Grid(grid.scale, zero, min(grid.lowest, zero), max(grid.highest, zero))
    match node.op_type:
        case "Concat":
            return builder.copy("Concat", tuple(codes), node.attributes), grid
        case "Pad":
            mode = node.attributes.get_string("mode", "constant")
            padding = node.inputs[2] if len(node.inputs) > 2 else None
            padded_with = array_of(padding)
            if mode == "constant" and padding is not None and (padded_with is None or float(padded_with) != 0.0):
                return None, grid
            rest = (None,) if len(node.inputs) < 4 else (node.inputs[3],)
            inputs = (codes[0], node.inputs[1], builder.constant(zero, np.uint8), *(r for r in rest if r is not None))
            return builder.copy("Pad", inputs, node.attributes), with_zero
        case "MaxPool" if len(node.outputs) == 1:
            # Padded places count as smaller than every code, as they count as minus infinity in float.
            return builder.copy("MaxPool", (codes[0],), node.attributes), grid
        case "Relu":
            if grid.lowest >= zero:
                return codes[0], grid
            clipped = builder.node("Clip", codes[0], builder.constant(zero, np.uint8))
            return clipped, Grid(grid.scale, zero, zero, max(grid.highest, zero))
        case op if op in MOVES:
            return builder.copy(op, (codes[0], *node.inputs[1:]), node.attributes), grid
    return None, grid
