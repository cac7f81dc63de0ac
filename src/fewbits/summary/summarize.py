"""From a network and an example image to its summary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..convert import FLOAT_BITS, matches, plan_of
from ..layers import QUANTIZED, QuantLayer
from ..quantizers import Quantizer
from ..quantizers.base import Codes
from ..streams import INPUT_STREAM, OUTPUT_STREAM
from .observe import LAYERS, Call, Seen, observe
from .rows import Grid, LayerRow, OtherRow, ProductRow, StreamRow, Summary, Totals

FLOAT_BYTES = 4
HIDDEN = "hidden inside nn.MultiheadAttention"
_SIDES = {INPUT_STREAM: "input", OUTPUT_STREAM: "output"}


def summarize(model: nn.Module, example: Tensor) -> Summary:
    """What each layer holds and costs, and what stayed float and why; the model's mode and state are untouched.

    MACs and bit operations are those of one image, and count each call of a shared module. Bytes are those of the codes
    as packed, ``ceil(bits * n / 8)``, of scales, float biases and norms; an exporter may fold norms and save some.

    Args:
        model: float or quantized.
        example: images, N x C x H x W; the first one runs through the model once.

    Raises:
        ValueError: the model does not run on the example.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> summary = summarize(net, torch.zeros(1, 3, 3, 3))
    >>> [(row.name, row.kind, row.macs, row.size_bytes) for row in summary.rows]
    [('0', 'conv 3x3', 216, 864), ('3', 'linear', 16, 72)]
    """
    seen = observe(model, example)
    counted: dict[int, str] = {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    layers.sort(key=lambda item: seen.calls[item[0]].order if item[0] in seen.calls else len(seen.calls))
    rows = tuple(_layer_row(model, name, layer, seen, counted) for name, layer in layers)
    streams = tuple(_stream_rows(model, seen))
    others = tuple(_other_rows(model, seen, counted))
    products = tuple(
        ProductRow(operation, name, times, macs) for (operation, name), (times, macs) in seen.products.items()
    )
    return Summary(type(model).__name__, rows, streams, others, products, _totals(rows, streams, others, products))


def _layer_row(model: nn.Module, name: str, layer: nn.Module, seen: Seen, counted: dict[int, str]) -> LayerRow:
    quantized = layer if isinstance(layer, QuantLayer) else None
    weight_quantizer = quantized.weight_quantizer if quantized else None
    input_quantizer = quantized.input_quantizer if quantized else None
    weight, bias = layer.get_parameter("weight"), layer.bias
    remarks = [] if quantized else [_why_float(model, name, layer)]
    parameters = size_bytes = 0
    codes = weight_quantizer.encode(weight) if weight_quantizer else None
    for parameter in (weight, bias):
        if not isinstance(parameter, Tensor):
            continue
        if id(parameter) in counted:
            remarks.append(f"shares its parameters with {counted[id(parameter)]}")
            continue
        counted[id(parameter)] = name
        parameters += parameter.numel()
        packed = weight_quantizer.bits if weight_quantizer and parameter is weight else FLOAT_BITS
        size_bytes += (packed * parameter.numel() + 7) // 8
    if codes is not None:
        size_bytes += FLOAT_BYTES * (codes.scale.numel() + (codes.offset.numel() if bool(codes.offset.any()) else 0))
    if input_quantizer is not None:
        size_bytes += _quantizer_bytes(input_quantizer)
    call = seen.calls.get(name)
    macs = seen.macs.get(name, 0)
    if call is None and name not in seen.macs:
        remarks.append("did not run on the example")
    bits = [FLOAT_BITS if q is None or not bool(q.enabled) else q.bits for q in (weight_quantizer, input_quantizer)]
    macs_in_float = seen.without_call.get(name, 0)
    if macs_in_float and remarks[:1] != [HIDDEN]:
        remarks.append("its weight is used without calling it, in float")
    return LayerRow(
        name=name,
        kind=_kind(layer),
        weight=_grid(weight_quantizer, codes),
        activation=_grid(input_quantizer, seen.grids.get(f"{name}.input_quantizer" if name else "input_quantizer")),
        input_shape=call.input_shape if call else (),
        output_shape=call.output_shape if call else (),
        calls=call.calls if call else 0,
        parameters=parameters,
        macs=macs,
        bit_operations=(macs - macs_in_float) * bits[0] * bits[1] + macs_in_float * FLOAT_BITS**2,
        size_bytes=size_bytes,
        float_bytes=FLOAT_BYTES * parameters,
        reason="; ".join(dict.fromkeys(remarks)),
    )


def _why_float(model: nn.Module, name: str, layer: nn.Module) -> str:
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return HIDDEN
    if type(layer) not in QUANTIZED:
        base = next(base for base in LAYERS if isinstance(layer, base))
        return f"subclass of nn.{base.__name__} named {type(layer).__name__}"
    plan = plan_of(model)
    if plan is None:
        is_quantized = any(isinstance(module, Quantizer) for module in model.modules())
        return "not quantized" if is_quantized else "the network is float"
    if any(matches(name, pattern) for pattern in plan.keep):
        return "kept by the plan"
    if any(matches(name, rule.pattern) for rule in plan.rules) or plan.weights == plan.activations == FLOAT_BITS:
        return "32 bits asked for"
    return "first or last layer"


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d):
        return "linear"
    size = "x".join(str(n) for n in layer.kernel_size)
    if layer.groups == 1:
        return f"conv {size}"
    return f"depthwise {size}" if layer.groups == layer.in_channels else f"conv {size}, {layer.groups} groups"


def _grid(quantizer: Quantizer | None, codes: Codes | None) -> Grid | None:
    if quantizer is None:
        return None
    state = "calibrated" if bool(quantizer.calibrated) or not quantizer.needs_data else "not calibrated"
    if not bool(quantizer.enabled):
        state = "off"
    if codes is None:
        return Grid(quantizer.spec.method, quantizer.bits, None, None, None, state)
    lowest = float((codes.low * codes.scale + codes.offset).min())
    highest = float((codes.high * codes.scale + codes.offset).max())
    # Binary codes are -1 and +1: the distance of levels is the range's.
    gap = (codes.high - codes.low) / quantizer.num_steps if quantizer.bits == 1 else 1
    step = (float(codes.scale.min()) * gap, float(codes.scale.max()) * gap)
    return Grid(quantizer.spec.method, quantizer.bits, lowest < 0, step, (lowest, highest), state)


def _quantizer_bytes(quantizer: Quantizer) -> int:
    """An activation quantizer's learned numbers, and its zero point if it has one."""
    zero_point = quantizer.get_buffer("zero_point") if "zero_point" in dict(quantizer.named_buffers()) else None
    numbers = sum(p.numel() for p in quantizer.parameters())
    return FLOAT_BYTES * (numbers + (1 if zero_point is not None and bool(zero_point) else 0))


def _stream_rows(model: nn.Module, seen: Seen) -> Iterator[StreamRow]:
    inside = {
        id(q) for m in model.modules() if isinstance(m, QuantLayer) for q in (m.weight_quantizer, m.input_quantizer)
    }
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, Quantizer) and id(m) not in inside]
    never = Call((), (), 0, len(seen.calls))
    found.sort(key=lambda item: seen.calls.get(item[0], never).order)
    for name, quantizer in found:
        owner, _, own = name.rpartition(".")
        grid = _grid(quantizer, seen.grids.get(name))
        assert grid is not None
        shape = seen.calls.get(name, never).input_shape
        yield StreamRow(owner, _SIDES.get(own, own), grid, shape, _quantizer_bytes(quantizer))


def _other_rows(model: nn.Module, seen: Seen, counted: dict[int, str]) -> Iterator[OtherRow]:
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        inside_quantizer = any(isinstance(model.get_submodule(name[:end]), Quantizer) for end in _ends(name))
        if isinstance(module, LAYERS) or inside_quantizer:
            continue
        has_numbers = any(True for _ in module.parameters(recurse=False)) or _float_buffers(module)
        if has_numbers or name in seen.macs:
            found.setdefault(type(module).__name__, []).append((name, module))
    for kind, modules in found.items():
        parameters = buffers = 0
        for name, module in modules:
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in counted:
                    counted[id(parameter)] = name
                    parameters += parameter.numel()
            buffers += sum(b.numel() for b in _float_buffers(module))
        macs = sum(seen.macs.get(name, 0) for name, _ in modules)
        reason = "multiplies by a weight that is no layer's" if macs else ""
        if any(isinstance(module, nn.MultiheadAttention) for _, module in modules):
            reason = "nn.MultiheadAttention hides its projections"
        yield OtherRow(kind, len(modules), parameters, FLOAT_BYTES * (parameters + buffers), macs, reason)


def _ends(name: str) -> Iterator[int]:
    """Where the names of the module and of those that hold it end."""
    yield from (i for i, letter in enumerate(name) if letter == ".")
    yield len(name)


def _float_buffers(module: nn.Module) -> list[Tensor]:
    """Running averages and such, as far as they are saved; counters are whole numbers."""
    saved = module._buffers.keys() - module._non_persistent_buffers_set
    buffers = [module._buffers[key] for key in sorted(saved)]
    return [b for b in buffers if b is not None and torch.is_floating_point(b)]


def _totals(
    rows: tuple[LayerRow, ...],
    streams: tuple[StreamRow, ...],
    others: tuple[OtherRow, ...],
    products: tuple[ProductRow, ...],
) -> Totals:
    float_macs = sum(row.macs for row in others) + sum(row.macs for row in products)
    macs = float_macs + sum(row.macs for row in rows)
    bit_operations = float_macs * FLOAT_BITS**2 + sum(row.bit_operations for row in rows)
    other_bytes = sum(row.size_bytes for row in others)
    size_bytes = other_bytes + sum(row.size_bytes for row in rows) + sum(row.size_bytes for row in streams)
    float_bytes = other_bytes + sum(row.float_bytes for row in rows)
    return Totals(
        parameters=sum(row.parameters for row in rows) + sum(row.parameters for row in others),
        size_bytes=size_bytes,
        float_bytes=float_bytes,
        size_ratio=float_bytes / size_bytes if size_bytes else 1.0,
        macs=macs,
        bit_operations=bit_operations,
        float_bit_operations=macs * FLOAT_BITS**2,
        bit_operations_ratio=macs * FLOAT_BITS**2 / bit_operations if bit_operations else 1.0,
    )
