"""Quantization-aware training as others have it: a float network in, their trainable network out.

Each is set up as its own documentation shows, learned scales where it has them. What is not installed is an ImportError
or, for what exists but cannot do this, a NotImplementedError that says so; nothing is installed here.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def replaced(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of ``model`` with each convolution and linear layer as ``make`` gives it; None keeps it."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear) and (made := make(module)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    return model


class _PlainLayer(nn.Module):
    """LSQ as anybody writes it down: operators of PyTorch, detach for the straight-through gradient."""

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self.layer, self.high, self.w_high = layer, 2**bits - 1, max(2 ** (bits - 1) - 1, 1)
        weight: Any = layer.weight
        self.w_step = nn.Parameter(2 * weight.detach().abs().mean() / self.w_high**0.5)
        self.x_step = nn.Parameter(torch.tensor(2.0 / self.high))

    @staticmethod
    def quantize(x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:
        step = step.detach() + (step - step.detach()) * scale
        v = (x / step).clamp(low, high)
        return (v + (v.round() - v).detach()) * step

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        x = self.quantize(x, self.x_step, 0, self.high, (x[0].numel() * self.high) ** -0.5)
        scale = (layer.weight.numel() * self.w_high) ** -0.5
        w = self.quantize(layer.weight, self.w_step, -self.w_high - 1, self.w_high, scale)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, w, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, w, layer.bias)


def plain_lsq(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Thirty lines of one's own; as much quantized as a peer quantizes: inputs and weights of all layers."""
    return replaced(model, lambda layer: _PlainLayer(layer, bits))


class _FusedLayer(nn.Module):
    """PyTorch's own fused fake-quantize operator with a learned scale."""

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
        from torch.ao.quantization.observer import MovingAverageMinMaxObserver

        self.layer = layer
        low = -(2 ** (bits - 1))
        grids = {"x": (0, 2**bits - 1, torch.quint8), "w": (low, -low - 1, torch.qint8)}
        for name, (start, end, dtype) in grids.items():
            quantizer = _LearnableFakeQuantize(
                MovingAverageMinMaxObserver,
                quant_min=start,
                quant_max=end,
                scale=0.1,
                use_grad_scaling=True,
                dtype=dtype,
            )
            quantizer.enable_param_learning()
            setattr(self, name, quantizer)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        x, w = self.x(x), self.w(layer.weight)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, w, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, w, layer.bias)


def torch_ao(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """torch.ao's learnable fake-quantize around every layer."""
    return replaced(model, lambda layer: _FusedLayer(layer, bits))


def brevitas(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Brevitas with scales that are parameters from the first step on."""
    qnn = importlib.import_module("brevitas.nn")
    quant = importlib.import_module("brevitas.quant")
    options = {
        "weight_quant": quant.Int8WeightPerTensorFloat,
        "weight_bit_width": bits,
        "weight_scaling_impl_type": "parameter_from_stats",
        "input_quant": quant.Uint8ActPerTensorFloat,
        "input_bit_width": bits,
        "input_scaling_impl_type": "parameter",
        "input_scaling_init": 1.0,
    }

    def make(layer: Any) -> nn.Module:
        if isinstance(layer, nn.Linear):
            made = qnn.QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, **options)
        else:
            made = qnn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                bias=layer.bias is not None,
                **options,
            )
        made.load_state_dict(layer.state_dict(), strict=False)
        return made

    return replaced(model, make)


def torchao(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Torchao's quantization-aware training, which has linear layers only.

    Raises:
        NotImplementedError: the network has convolutions beyond a stem.
    """
    qat = importlib.import_module("torchao.quantization.qat")
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
        raise NotImplementedError("has no convolutions")
    kinds = {4: torch.int4, 8: torch.int8}
    if bits not in kinds:
        raise NotImplementedError(f"has no {bits} bits")
    config = qat.QATConfig(
        activation_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=qat.IntxFakeQuantizeConfig(kinds[bits], "per_channel"),
        step="prepare",
    )
    model = copy.deepcopy(model)
    importlib.import_module("torchao.quantization").quantize_(model, config)
    return model


def nncf(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """NNCF's 8-bit quantizers, which train along.

    Raises:
        NotImplementedError: other bits.
    """
    if bits != 8:
        raise NotImplementedError("has 8 bits only")
    library = importlib.import_module("nncf")
    made: nn.Module = library.quantize(copy.deepcopy(model).eval(), library.Dataset([images[:8]]), subset_size=1)
    return made.train()


def modelopt(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """NVIDIA's ModelOpt; its scales stay where calibration put them."""
    library = importlib.import_module("modelopt.torch.quantization")
    config = copy.deepcopy(library.INT8_DEFAULT_CFG)
    given = config["quant_cfg"]
    # A mapping in older releases, a list of entries in newer ones.
    entries = given.values() if isinstance(given, dict) else given
    for entry in entries:
        for part in (entry, entry.get("cfg")) if isinstance(entry, dict) else ():
            if isinstance(part, dict) and part.get("num_bits") == 8:
                part["num_bits"] = bits
    made: nn.Module = library.quantize(copy.deepcopy(model), config, lambda network: network(images[:8]))
    return made


PEERS: dict[str, Callable[[nn.Module, Tensor, int], nn.Module]] = {
    "plain-lsq": plain_lsq,
    "torch.ao": torch_ao,
    "brevitas": brevitas,
    "torchao": torchao,
    "nncf": nncf,
    "modelopt": modelopt,
}


def build(name: str, model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """The peer's network, in training mode.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: it cannot do this, and says why.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PEERS[name](model, images, bits)
        made.train()(images)  # some make their parameters in the first pass
    return made
