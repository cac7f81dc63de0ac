"""Other forms of a file for an engine: plain QDQ for TensorRT, and ONNX's own types for packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .engines import ENGINES, Engine, OnnxRuntime, engine_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from .fold import Care
    from .markers import Built

VARIANT = "variant"
"""Key in a file's metadata: its form, where it is another than the engine's own."""

PACKED = "packed"
OPSET_OF_QDQ = 20
BY_PLACEMENT = "int8 by Q/DQ"
"""Stands for a kernel where no engine was asked: what TensorRT makes of a layer whose inputs are all dequantized."""


class PlainQDQ(OnnxRuntime):
    """Standard operators in the form of TensorRT's explicit quantization, see ``qdq``; checked in ONNX Runtime."""

    def build(
        self, traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], care: Mapping[str, Care]
    ) -> Built:
        """See ``qdq.PlainQDQ``; biases are floats, so that nothing needs care."""
        from . import markers, qdq

        built = markers.build(traced, student, {**metadata, VARIANT: "qdq"}, qdq.PlainQDQ())
        if not any(node.op_type == "GroupNormalization" for node in built.proto.graph.node):
            # Everything else means the same, and at opset 21 ONNX Runtime 1.31 refuses graphs with a slice of int8
            # codes: it copies QuantizeLinear with its type as an attribute, then makes the codes unsigned.
            built.proto.opset_import[0].version = OPSET_OF_QDQ
        return built

    def kernels(self, built: Built) -> dict[str, str]:
        """Read from the graph, for ONNX Runtime's kernels say nothing about TensorRT's."""
        from .placement import by_layer

        wrong = by_layer(built)
        return {site.layer: "float" if site.layer in wrong else BY_PLACEMENT for site in built.sites}

    def unfused(self, built: Built, kernels: Mapping[str, str]) -> dict[str, str]:
        """The rules that they break."""
        from .placement import by_layer

        return by_layer(built)

    def is_integer(self, kernel: str) -> bool:
        """By placement."""
        return kernel == BY_PLACEMENT


class StandardTypes(OnnxRuntime):
    """As for ONNX Runtime, but weights of 2 to 4 bits have ONNX's types INT4 and INT2 instead of packed bytes."""

    def build(
        self, traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], care: Mapping[str, Care]
    ) -> Built:
        """See ``onnx.build``."""
        from . import onnx

        return onnx.build(traced, student, {**metadata, VARIANT: "int4"}, care, standard_types=True)


VARIANTS: dict[str, dict[str, Engine]] = {name: {PACKED: engine} for name, engine in ENGINES.items()}
VARIANTS["onnxruntime"] |= {"qdq": PlainQDQ(), "int4": StandardTypes()}


def variant_of(path: Path) -> tuple[str, str]:
    """The engine that a file was written for, and its form.

    Raises:
        ImportError: see ``engine_of``.
        ValueError: see ``engine_of``; or the form is unknown here.
    """
    name = engine_of(path)
    variant = ENGINES[name].metadata(path).get(VARIANT, PACKED)
    if variant not in VARIANTS[name]:
        known = ", ".join(VARIANTS[name])
        raise ValueError(f"{path.name} is of the variant {variant!r}, which this version does not know: {known}")
    return name, variant
