"""Streams: what enters and leaves additions, concatenations and pooling, and what convolutions give to float operators.

A convolution whose output is added in float, or read by a SiLU, a gate or a layer norm, cannot run on integers in ONNX
Runtime. ``residual=8`` therefore trains 8-bit quantizers on these values, found by one symbolic trace. They hang on
modules as hooks, so that the model's own forward stays what it was.
"""

from .attach import INPUT_STREAM, OUTPUT_STREAM, attach, first_reader
from .finder import Place
from .trace import Trace, trace

__all__ = ["INPUT_STREAM", "OUTPUT_STREAM", "Place", "Trace", "attach", "first_reader", "trace"]
