"""The lines of a summary: frozen data that prints, compares and goes into JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..convert import FLOAT_BITS
from .text import Line, aligned, rich_table


@dataclass(frozen=True)
class Grid:
    """How one tensor is quantized.

    Args:
        method: of the quantizer.
        bits: 1 to 8.
        signed: whether the grid has levels below zero; None for a quantizer that never ran.
        step: smallest and largest distance of neighbouring levels over the channels; None likewise.
        range: lowest and highest level; None likewise.
        state: ``"calibrated"``, ``"not calibrated"`` or ``"off"``.
    """

    method: str
    bits: int
    signed: bool | None
    step: tuple[float, float] | None
    range: tuple[float, float] | None
    state: str

    def __str__(self) -> str:
        return f"{self.bits} {self.method}"


@dataclass(frozen=True)
class LayerRow:
    """One convolution or linear layer; all counts are for one image.

    Args:
        name: qualified.
        kind: for example ``conv 3x3`` or ``linear``.
        weight: None where the weight is float.
        activation: of the input; None where it is float.
        input_shape: of the first call, without the batch.
        output_shape: likewise; both empty for a layer that did not run.
        calls: how often it ran.
        parameters: of the layer that no layer above it shares.
        macs: multiply-accumulates of all calls.
        bit_operations: ``macs`` times bits of weights times bits of activations, float counting as 32.
        size_bytes: weights as packed, scales, and a float bias.
        float_bytes: the same in float.
        reason: why it stayed float, and other remarks.
    """

    name: str
    kind: str
    weight: Grid | None
    activation: Grid | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int
    parameters: int
    macs: int
    bit_operations: int
    size_bytes: int
    float_bytes: int
    reason: str

    @property
    def is_float(self) -> bool:
        """Whether nothing of it is quantized."""
        return self.weight is None and self.activation is None


@dataclass(frozen=True)
class StreamRow:
    """A quantizer outside of layers: on what enters or leaves additions, concatenations and pooling.

    Args:
        name: of the module that it hangs on.
        side: ``"input"`` or ``"output"`` of that module, or the quantizer's own name.
        grid: bits, method, range.
        shape: of the first call, without the batch.
        size_bytes: of its numbers.
    """

    name: str
    side: str
    grid: Grid
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class OtherRow:
    """All modules of one kind that have parameters and are no layers: norms, embeddings, other convolutions.

    Args:
        kind: the class.
        count: modules.
        parameters: trained numbers.
        size_bytes: of parameters and running averages, in float.
        macs: for one image, where a module multiplies by a weight of its own.
        reason: a remark.
    """

    kind: str
    count: int
    parameters: int
    size_bytes: int
    macs: int
    reason: str


@dataclass(frozen=True)
class ProductRow:
    """A product of two activations: it has no weight, and stays float.

    Args:
        operation: as PyTorch calls it; ``mul`` is elementwise.
        name: the module that it stands in; empty for the model itself.
        calls: how often.
        macs: multiplications for one image.
    """

    operation: str
    name: str
    calls: int
    macs: int


@dataclass(frozen=True)
class Totals:
    """Sums over everything that is listed; for one image.

    Args:
        parameters: trained numbers of the network, without its quantizers.
        size_bytes: as packed.
        float_bytes: of the float network.
        size_ratio: float_bytes / size_bytes.
        macs: of layers, other modules and products of activations.
        bit_operations: of all of them.
        float_bit_operations: 32 x 32 x macs.
        bit_operations_ratio: float_bit_operations / bit_operations.
    """

    parameters: int
    size_bytes: int
    float_bytes: int
    size_ratio: float
    macs: int
    bit_operations: int
    float_bit_operations: int
    bit_operations_ratio: float


@dataclass(frozen=True)
class Summary:
    """What a network is made of: ``str()`` is a table, ``to_data()`` is JSON, ``table()`` is for rich.

    Args:
        model: class of the network.
        rows: its layers in the order in which they run.
        streams: quantizers between layers.
        others: everything else that has parameters.
        products: products of two activations.
        totals: sums.
    """

    model: str
    rows: tuple[LayerRow, ...]
    streams: tuple[StreamRow, ...]
    others: tuple[OtherRow, ...]
    products: tuple[ProductRow, ...]
    totals: Totals

    @property
    def floats(self) -> tuple[LayerRow, ...]:
        """Layers that stayed float."""
        return tuple(row for row in self.rows if row.is_float)

    def to_data(self) -> dict[str, Any]:
        """JSON values, with tuples as lists."""
        return _lists(dataclasses.asdict(self))

    def table(self) -> Table:
        """For a rich console."""
        return rich_table(f"{self.model}, for one image", self._sections())

    def __str__(self) -> str:
        return aligned(self._sections())

    def _sections(self) -> list[list[Line]]:
        layers = [
            Line(
                row.name or "(the model itself)",
                row.kind,
                str(row.weight or "float"),
                _activation(row.activation),
                _state(row.weight, row.activation),
                f"{_shape(row.input_shape)} -> {_shape(row.output_shape)}" if row.calls else "-",
                row.parameters,
                row.macs,
                row.bit_operations,
                row.size_bytes,
                "; ".join(filter(None, (f"float: {row.reason}" if row.is_float else row.reason, _times(row.calls)))),
            )
            for row in self.rows
        ]
        streams = [
            Line(
                row.name, f"{row.side} stream", "", _activation(row.grid), _state(row.grid), _shape(row.shape) or "-",
                size_bytes=row.size_bytes,
            )
            for row in self.streams
        ]  # fmt: skip
        others = [
            Line(
                f"{row.count} x {row.kind}", "other", "float", "float", parameters=row.parameters,
                macs=row.macs or None, bit_operations=row.macs * FLOAT_BITS**2 or None,
                size_bytes=row.size_bytes, note=row.reason,
            )
            for row in self.others
        ]  # fmt: skip
        products = [
            Line(
                row.name or "(the model itself)", f"{row.operation}", "", "float", macs=row.macs,
                bit_operations=row.macs * FLOAT_BITS**2,
                note="; ".join(filter(None, ("float: product of two activations", _times(row.calls)))),
            )
            for row in self.products
        ]  # fmt: skip
        t = self.totals
        counts = (t.parameters, t.macs)
        totals = [
            Line("total", "", "", "", "", "", *counts, t.bit_operations, t.size_bytes),
            Line(
                "float", "", "", "", "", "", *counts, t.float_bit_operations, t.float_bytes,
                f"{t.size_ratio:.1f} x smaller, {t.bit_operations_ratio:.1f} x fewer bit operations",
            ),
        ]  # fmt: skip
        return [section for section in (layers, streams, others, products, totals) if section]


def _activation(grid: Grid | None) -> str:
    if grid is None:
        return "float"
    return f"{grid}{'' if grid.signed is None else ' signed' if grid.signed else ' unsigned'}"


def _state(*grids: Grid | None) -> str:
    return ", ".join(sorted({grid.state for grid in grids if grid is not None}))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _times(calls: int) -> str:
    return f"runs {calls} times" if calls > 1 else ""


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, list | tuple) else value
