"""Layers of one-bit weights and activations on OpenVINO's XNOR kernel: signs by threshold, packed u1 weights.

An activation's sign becomes a FakeQuantize of two levels with a threshold for each channel, which gives 1 for
x > threshold; sign(0) = +1 asks for x >= t, so the threshold is the float just below t (for zero the normal one).
Thresholds and outputs have to have the shape [1, C, 1, 1], or the kernel computes something else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..integers import Floats
from ..quantizers import Quantizer
from ..quantizers.sign import ReActActivation
from .activations import Bits
from .builder import Builder, producer
from .openvino_weights import DOMAIN as OPENVINO
from .packing import pack
from .weights import WeightGrid

OPERATOR, DOMAIN = "BinaryConvolution", "fewbits"
LISTS = ("strides", "pads", "dilations")

CHANNELS = 8
"""Input channels have to be a multiple of this, or the kernel is wrong without a word."""

ELEMENTWISE = ("Relu", "Clip", "Min", "Max", "LeakyRelu", "PRelu", "BatchNormalization", "Mul", "Add", "Sub", "Div")
SEEN_THROUGH = (*ELEMENTWISE, "Identity", "Cast", "Pad")
"""Measured: Relu, Clip, BatchNormalization. The others are, or may become, one of them or nothing in OpenVINO."""


def bits(builder: Builder, x: ir.Value, quantizer: Quantizer) -> Bits:
    """1 where the quantizer gives +1, 0 where it gives -1."""
    return Bits((compare(builder, x, quantizer, _turn(quantizer)),), -1.0, 2.0)


def compare(builder: Builder, x: ir.Value, quantizer: Quantizer, below: npt.ArrayLike) -> ir.Value:
    """1 for ``x > below``, else 0: OpenVINO's FakeQuantize of two levels. ``below`` is one number, or one a channel."""
    limit = _channels(x, quantizer, below)
    ends = [builder.constant(end, np.float32) for end in (limit, limit, np.zeros_like(limit), np.ones_like(limit))]
    return builder.append(ir.node("FakeQuantize", [x, *ends], {"levels": 2}, domain=OPENVINO))


def threshold(x: ir.Value, quantizer: Quantizer) -> Floats:
    """Where the sign turns: +1 for what is greater, 1 x C x 1 x 1."""
    return _channels(x, quantizer, _turn(quantizer))


def _turn(quantizer: Quantizer) -> npt.NDArray[np.float32]:
    """The largest float whose sign is -1; one number, or one a channel."""
    turn = np.zeros((), np.float32)
    if isinstance(quantizer, ReActActivation):
        # x + s >= 0 in floats exactly where x >= -s: rounding a sum does not change its sign.
        turn = -quantizer.shift.detach().numpy()
    return np.asarray(np.nextafter(turn, np.float32(-np.inf)))


def _channels(x: ir.Value, quantizer: Quantizer, below: npt.ArrayLike) -> Floats:
    """The limit of every channel, 1 x C x 1 x 1."""
    num_channels = _num_channels(x, quantizer)
    limit = np.broadcast_to(np.asarray(below, np.float32), num_channels)
    # Kernels may take numbers below the smallest normal one for zero.
    smallest = np.finfo(np.float32).tiny
    limit = np.where(np.abs(limit) < smallest, np.where(limit < 0, -smallest, 0.0), limit)
    shape = [1] * _rank(x)
    shape[quantizer.channel_dim] = num_channels
    return np.asarray(limit.reshape(shape), np.float32)


def refusal(conv: ir.Node, shape: tuple[int, ...], source: ir.Value | None) -> str:
    """Why the XNOR kernel cannot serve a convolution of one-bit weights of ``shape``; empty if it can.

    Args:
        conv: of the graph.
        shape: of its weights.
        source: what becomes bits in front of it.
    """
    group = conv.attributes.get("group")
    if group is not None and group.as_int() != 1:
        return "the XNOR kernel has no groups"
    if len(shape) != 4:
        return "the XNOR kernel is for two dimensions"
    if shape[1] % CHANNELS:
        return f"the XNOR kernel takes multiples of {CHANNELS} input channels, and this layer has {shape[1]}"
    if is_behind_concat(source):
        return "OpenVINO moves signs in front of a concatenation, and the kernel then reads memory that is not its own"
    return ""


def is_behind_concat(source: ir.Value | None) -> bool:
    """Whether OpenVINO 2026.4 might take a FakeQuantize of ``source`` apart and put it in front of a concatenation.

    It does so behind one, and behind a ReLU, Clip or batch norm of one, which it makes part of the FakeQuantize (not
    behind a pool or a reshape), if anything in the network has int8. Two levels are bits: they are then put together as
    if they were floats, and the process dies or the results are noise.
    """
    while (node := producer(source, *SEEN_THROUGH)) is not None:
        read = [value for value in node.inputs if value is not None and value.const_value is None]
        source = read[0] if len(read) == 1 else None
    return producer(source, "Concat") is not None


def convolution(builder: Builder, bit: ir.Value, conv: ir.Node, grid: WeightGrid, pad: float = 0.0) -> ir.Value:
    """Sums of products of signs, N x O x H x W: whole numbers.

    Args:
        builder: of the graph.
        bit: 0 and 1 for -1 and +1.
        conv: whose strides, pads and dilations count.
        grid: one-bit weights.
        pad: what stands around the map: 0 counts nothing, -1 and +1 are signs.
    """
    packed = builder.constant(pack(grid.unsigned, 1), np.uint8, f"{grid.name}.packed")
    lists = {name: [int(v) for v in conv.attributes[name].as_ints()] for name in LISTS if name in conv.attributes}
    attributes = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]} | lists
    shape = {"shape": [int(size) for size in grid.unsigned.shape]}
    node = ir.node(OPERATOR, [bit, packed], attributes | shape, domain=DOMAIN)
    if pad:
        node.attributes["pad_value"] = ir.AttrFloat32("pad_value", pad)
    return builder.append(node)


def _num_channels(x: ir.Value, quantizer: Quantizer) -> int:
    size = x.shape[quantizer.channel_dim] if x.shape is not None else None
    return size if isinstance(size, int) else quantizer.num_channels


def _rank(x: ir.Value) -> int:
    return len(x.shape) if x.shape is not None else 4
