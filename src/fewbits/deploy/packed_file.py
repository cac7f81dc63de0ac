"""The file of a packed network: how its tensors lie in it, and that none of its bytes is another.

In the file lie ``LAYER.weight`` (uint8, see ``packing``) for each quantized weight, and for each type of the other
numbers one tensor called after it: ``float32`` holds all scales, steps, norms, biases and float weights, end to end in
the order of their names (a name for each would cost more bytes than most of them hold). The header's entry
``fewbits_packed`` is JSON: what the network is built from, each layer's grid, and a checksum of all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..layers import QuantLayer
from ..quantizers import Quantizer
from ..quantizers.packed import PackedWeight
from .packing import pack

FORMAT = 1
HEADER = "fewbits_packed"
PACKED_FILE = "student-packed.safetensors"
"""What ``fewbits pack`` calls the file in a run folder."""

SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps", "negative_slope")
"""Of layers, where they have them: what changes their results without changing a shape."""


def content(network: nn.Module, header: dict[str, Any]) -> bytes:
    """The bytes of the file: the same network and header give the same."""
    others = others_of(network)
    tensors = {
        kind: torch.cat([others[name].detach().cpu().reshape(-1) for name in names])
        for kind, names in by_type(others).items()
    }
    for name, layer in packed_layers(network):
        codes = pack(codes_of(layer).codes.cpu().numpy(), codes_of(layer).bits)
        tensors[file_name(name)] = torch.from_numpy(codes)
    whole = header | {"sha256": digest(tensors, header)}
    return save(tensors, metadata={HEADER: json.dumps(whole, sort_keys=True, separators=(",", ":"))})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that is whole.

    Raises:
        ValueError: it is missing, damaged, foreign, or of another format.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give the file in it that fewbits pack wrote, for a run {path / PACKED_FILE}"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a file that fewbits pack wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch or pack it again") from error
    if HEADER not in metadata:
        raise ValueError(f"{path} is a safetensors file that fewbits pack did not write; give one that it wrote")
    damaged = f"{path} is damaged: its content does not match its checksum; fetch or pack it again"
    try:
        header = dict(json.loads(metadata[HEADER]))
    except (ValueError, TypeError) as error:
        raise ValueError(damaged) from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} has format {header.get('format')!r}, this version reads {FORMAT}; update fewbits")
    if header.pop("sha256", None) != digest(tensors, header):
        raise ValueError(damaged)
    return tensors, header


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 of every name, type, shape and byte."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def packed_layers(network: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """The layers whose weights are codes, with their names."""
    for name, layer in network.named_modules():
        if isinstance(layer, QuantLayer) and isinstance(layer.weight_quantizer, PackedWeight):
            yield name, layer


def codes_of(layer: nn.Module) -> PackedWeight:
    """The codes of one of them."""
    assert isinstance(layer, QuantLayer)
    assert isinstance(layer.weight_quantizer, PackedWeight)
    return layer.weight_quantizer


def left_out(network: nn.Module) -> list[str]:
    """Packed layers whose float weight nobody else owns, an embedding for example: it need not be in the file."""
    layers = dict(packed_layers(network))
    inside = {id(layer) for layer in layers.values()}
    shared = {
        id(parameter)
        for module in network.modules()
        for key, parameter in module._parameters.items()
        if id(module) not in inside or key != "weight"
    }
    return [name for name, layer in layers.items() if id(layer.weight) not in shared]


def others_of(network: nn.Module) -> dict[str, Tensor]:
    """Every saved tensor, once, but packed codes and the float weights behind them; by name."""
    behind = {id(network.get_submodule(name).weight) for name in left_out(network)}
    behind |= {id(codes_of(layer).codes) for _, layer in packed_layers(network)}
    saved = network.state_dict().keys()
    found = sorted([*network.named_parameters(), *network.named_buffers()], key=lambda entry: entry[0])
    return {name: tensor for name, tensor in found if name in saved and id(tensor) not in behind}


def by_type(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names by type, as the types are called in the file."""
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
    return found


def layout(network: nn.Module) -> str:
    """A checksum of what numbers alone do not say: names, types, shapes, grids, strides, ...

    Two networks that share it take each other's numbers; an architecture with another stride takes them too, and would
    compute something else.
    """
    lines = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in others_of(network).items()]
    lines += [f"{name} {tuple(layer.weight.shape)}" for name, layer in sorted(packed_layers(network))]
    for name, module in sorted(network.named_modules()):
        if isinstance(module, Quantizer):
            lines.append(f"{name} {module.spec.method} {module.spec.bits} {module.spec.role}")
        elif isinstance(module, QuantLayer) or not any(True for _ in module.children()):
            settings = {key: getattr(module, key) for key in SETTINGS if hasattr(module, key)}
            lines.append(f"{name} {type(module).__name__} {settings}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_name(layer: str) -> str:
    """What a layer's weight is called, in the network and in the file."""
    return f"{layer}.weight" if layer else "weight"
