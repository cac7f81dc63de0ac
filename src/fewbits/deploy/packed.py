"""A quantized network as one file for PyTorch: weights as packed codes, everything else as it is."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..convert import check_calibrated, plan_of, quantize, quantizers_of
from ..data import Normalisation
from ..layers import QuantLayer
from ..quantizers.packed import INFERENCE, PackedWeight
from ..runs import plan_from_data, student_architecture
from ..training import read_json
from ..training.folder import RUN, as_data
from .packed_file import FORMAT, by_type, codes_of, content, file_name, layout, left_out, others_of, packed_layers, read
from .packing import packed_size, unpack
from .result import ParityError
from .sizes import sizes

SUFFIX = ".safetensors"
DESCRIBED = ("model", "blocks", "recipe_name", "recipe_options", "data", "normalisation")
"""Entries of ``run.json`` that say how to build the network again, and what goes in and comes out."""

HELD = "fewbits_described"
"""Where a network that was loaded keeps these entries."""


@dataclass(frozen=True)
class Packed:
    """A packed file that was written and read back.

    Args:
        path: of the file.
        size_bytes: of the file.
        theoretical_bytes: every quantized weight at its bits, every other parameter at 32, see ``sizes``.
        saved_bytes: every packed weight, and all else that is saved at 32: running statistics too, and scales that a
            quantizer works out.
        float_bytes: every parameter of the network without its quantizers at 32 bits.
        num_layers: with packed weights.
    """

    path: Path
    size_bytes: int
    theoretical_bytes: int
    saved_bytes: int
    float_bytes: int
    num_layers: int


def pack(
    student: nn.Module,
    path: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    example: Tensor | None = None,
) -> Packed:
    """Write ``student`` as one file of packed codes for ``load_packed``; read back and compared before it is in place.

    A weight whose quantizer is switched off is written in float. The same student gives the same bytes.

    Args:
        student: a quantized and calibrated network; it is not changed.
        path: ends in ``.safetensors``; a file that is there is replaced.
        run: the run folder that the student came from. Its architecture, classes and normalisation go into the file,
            which is then loaded by itself; without one, ``load_packed`` takes the float architecture beside the file.
        example: a batch as the student takes it (normalised); the loaded network must give the same outputs bit for
            bit.

    Raises:
        ParityError: the network that was read back is another one; no file is left.
        TypeError: ``student`` is no network.
        ValueError: nothing is quantized, or not calibrated; another suffix, or a folder that is not there; a weight
            that is no parameter or not finite.
    """
    checks.check_network("student", student)
    target = Path(path)
    if target.suffix != SUFFIX:
        raise ValueError(f"path must end in {SUFFIX}, got {target.name!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {str(path)!r}")
    network = _frozen(student)
    header = _described(network, None if run is None else Path(run))
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        draft.write_bytes(content(network, header))
        loaded = load_packed(draft, None if "model" in header else network)
        try:
            torch.testing.assert_close(_state(loaded), _state(network.cpu()), rtol=0, atol=0)
            if example is not None:
                device = next(student.parameters()).device
                outputs = [_outputs(net.to(device), example.to(device)) for net in (copy.deepcopy(student), loaded)]
                torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
        except AssertionError as error:
            raise ParityError(f"the packed network is not the student, or it holds NaN: {error}") from error
        size = draft.stat().st_size
        os.replace(draft, target)
    (theoretical, full), count = sizes(student), sum(1 for _ in packed_layers(network))
    return Packed(target, size, theoretical, _saved(network), full, count)


def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The packed network, in eval mode on the CPU; its outputs are those of the student that was packed, bit for bit.

    It is for inference and for ``export``: it does not run in training mode, and loads no float state.

    Args:
        path: a file that ``pack`` wrote.
        model: the architecture, float or quantized, where the file does not say it by name; only its structure counts,
            and it is not changed.

    Raises:
        ValueError: the file is missing, damaged, foreign or of another format; or it does not fit ``model``.
    """
    path = Path(path)
    tensors, header = read(path)
    network = _architecture(path, header, model)
    misfit = (
        f"{path} does not fit {type(network).__name__ if model is None else 'model, a ' + type(model).__name__}: it "
        f"holds a {header['network']} with other layers, sizes or residual streams; pass the architecture that was "
        "packed as model, or pack it again if another version of fewbits did"
    )
    quantizers = dict(sorted(quantizers_of(network)))
    if len(quantizers) != len(header["bits"]):
        raise ValueError(misfit)
    for quantizer, bits in zip(quantizers.values(), header["bits"], strict=True):
        quantizer.set_bits(bits)
    modules = dict(network.named_modules())
    for name, grid in header["layers"].items():
        layer = modules.get(name)
        if not isinstance(layer, QuantLayer):
            raise ValueError(misfit)
        layer.weight_quantizer = _weight(layer, tensors[file_name(name)], grid, misfit)
    others = others_of(network)
    if layout(network) != header["layout"]:
        raise ValueError(misfit)
    with torch.no_grad():
        for kind, names in by_type(others).items():
            parts = tensors[kind].split([others[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                others[name].copy_(part.view(others[name].shape))
        for name in left_out(network):
            weight = network.get_parameter(file_name(name))
            weight.copy_(codes_of(modules[name]).fake_quantize(weight))
    # Packed again, it still says how to build it.
    network.__dict__[HELD] = {key: header[key] for key in DESCRIBED if key in header}
    if header.get("plan"):
        network.__dict__["fewbits_plan"] = plan_from_data(header["plan"], str(path))
    if header.get("normalisation"):
        mean, std = header["normalisation"]["mean"], header["normalisation"]["std"]
        network.__dict__["fewbits_normalisation"] = Normalisation(tuple(mean), tuple(std))
    network.register_forward_pre_hook(_refuse_training)
    return network.requires_grad_(False).eval()


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a packed file says of its network: ``data`` (with the classes), ``normalisation``, ``plan``, ``layers``.

    Raises:
        ValueError: see ``load_packed``.
    """
    return read(Path(path))[1]


def _frozen(student: nn.Module) -> nn.Module:
    """A copy, in eval mode, whose switched-on weight quantizers are ``PackedWeight``."""
    check_calibrated(student)
    network = copy.deepcopy(student).eval()
    for name, layer in network.named_modules():
        quantizer = layer.weight_quantizer if isinstance(layer, QuantLayer) else None
        if quantizer is None or isinstance(quantizer, PackedWeight) or not bool(quantizer.enabled):
            continue
        if "weight" not in layer._parameters:
            raise ValueError(f"the weight of {name} is computed from others; remove the parametrization before packing")
        try:
            layer.weight_quantizer = PackedWeight.of(quantizer, layer.weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not any(True for _ in packed_layers(network)):
        raise ValueError(
            f"student {type(student).__name__} has no quantized weight, so there is nothing to pack; quantize it "
            "first, or save its state_dict() as it is"
        )
    return network


def _described(network: nn.Module, run: Path | None) -> dict[str, Any]:
    """The header but for its checksum, as plain data."""
    try:
        writer = version("fewbits")
    except PackageNotFoundError:  # a checkout that is not installed
        writer = "unknown"
    header: dict[str, Any] = {"format": FORMAT, "fewbits": writer, "network": type(network).__name__}
    header["plan"] = as_data(plan_of(network))
    header["normalisation"] = as_data(network.__dict__.get("fewbits_normalisation"))
    held = network.__dict__.get(HELD, {}) if run is None else read_json(run / RUN)
    header |= {key: held[key] for key in DESCRIBED if key in held}
    header["bits"] = [quantizer.bits for _, quantizer in sorted(quantizers_of(network))]
    header["layers"] = {name: _grid(codes_of(layer)) for name, layer in packed_layers(network)}
    header["layout"] = layout(network)
    described: dict[str, Any] = json.loads(json.dumps(header))
    return described


def _architecture(path: Path, header: Mapping[str, Any], model: nn.Module | None) -> nn.Module:
    """The quantized network that the file describes, or that the user brings, with any values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays float was said when the student was made
        if model is None:
            if "model" not in header:
                raise ValueError(
                    f"{path} holds a {header['network']} that has no name to build it by; pass the float architecture: "
                    "load_packed(path, model=...)"
                )
            return student_architecture(header)
        checks.check_network("model", model)
        if any(True for _ in quantizers_of(model)) or not header.get("plan"):
            return copy.deepcopy(model).cpu()
        return quantize(model, plan=plan_from_data(header["plan"], str(path))).cpu()


def _grid(codes: PackedWeight) -> dict[str, Any]:
    """What decodes a layer's codes; scales and offsets have a shape where there is one for each channel."""
    grid: dict[str, Any] = {"bits": codes.bits, "low": codes.low, "high": codes.high}
    for name, values in (("scale", codes.scale), ("offset", codes.offset)):
        if values.ndim:
            grid[name] = list(values.shape)
    return grid


def _weight(layer: QuantLayer, packed: Tensor, grid: Mapping[str, Any], misfit: str) -> PackedWeight:
    """The layer's codes; the values of scale and offset are read with the other floats."""
    replaced, count = layer.weight_quantizer, layer.weight.numel()
    if replaced is None or replaced.bits != grid["bits"] or packed.numel() != packed_size(count, grid["bits"]):
        raise ValueError(misfit)
    codes = torch.from_numpy(unpack(packed.numpy(), grid["bits"], count)).view(layer.weight.shape)
    scale, offset = torch.ones(grid.get("scale", ())), torch.zeros(grid.get("offset", ()))
    return PackedWeight(
        replaced.spec, replaced.num_channels, replaced.engine, codes, scale, offset, grid["low"], grid["high"]
    )


def _refuse_training(network: nn.Module, args: tuple[Any, ...]) -> None:
    """Before the first batch norm in front of a packed layer has moved its statistics."""
    if network.training:
        raise ValueError(INFERENCE)


def _saved(network: nn.Module) -> int:
    """See ``Packed``."""
    layers = {id(layer.weight): layer for _, layer in packed_layers(network)}
    packed = sum(packed_size(layer.weight.numel(), codes_of(layer).bits) for layer in layers.values())
    return packed + 4 * sum(t.numel() for t in others_of(network).values() if t.is_floating_point())


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Everything that is in the file."""
    codes = {f"{name}.codes": codes_of(layer).codes for name, layer in packed_layers(network)}
    return {name: tensor.detach() for name, tensor in others_of(network).items()} | codes


def _outputs(network: nn.Module, example: Tensor) -> Any:
    with torch.no_grad():
        return network.eval()(example)
