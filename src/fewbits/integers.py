"""What an integer kernel multiplies and adds, known before any engine is: whole weights, and biases on their grid.

An engine adds a layer's bias to its sum of integer products, in units of input step times weight step. A batch norm's
shift is no whole number of these, and rounding it moves codes: at 8 bits a few in a thousand, at 2 bits nearly all
(there the weights are multiplied by a whole number, see ``largest_factors``, which makes the unit smaller). So the
network that was trained is settled first: its shifts move onto the grid that the engine has, by half a unit at most.
Afterwards PyTorch and the engine add the same bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from . import checks
from .convert import check_calibrated, quantizers_of
from .layers import QuantConv2d
from .quantizers import Codes, Quantizer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LIFTED_BITS = 5
"""From so many bits on weights leave no room for a factor; then the input's codes are shifted up to use all 8 bits, if
they are fewer.
"""

LARGEST_BIAS = 2**30
"""Leaves half of int32 to the sum of products."""

_NEGLIGIBLE = 0.01
"""Of the standard deviation of a layer's results: no shift moves further. A half unit is less, but behind inputs that
never change, where a batch norm has seen no variance and scales by hundreds.
"""

_SATURATION = 32767
"""Processors without VNNI add two u8 x s8 products in 16 bits."""


def whole(quantizer: Quantizer, codes: Codes) -> tuple[Ints, Floats]:
    """The whole numbers that an engine multiplies, in the weight's shape, and their scales, one or one a channel.

    Args:
        quantizer: of the weight.
        codes: what it made of the weight.

    Raises:
        ValueError: the grid has a float offset, so that no whole numbers will do.
    """
    integers, scale = codes.integers.cpu().numpy().astype(np.int64), codes.scale.double().cpu().numpy().reshape(-1)
    match quantizer.engine:
        case "integer":
            return integers, scale
        case "shifted":
            # q * scale + offset with offset = -scale * (2**b - 1) / 2: whole numbers of half the scale.
            return 2 * integers - quantizer.num_steps, scale / 2
    raise ValueError(f"a {quantizer.spec.method} weight of {quantizer.bits} bits has an offset that is no whole number")


def largest_factors(integers: Ints, largest_input: int) -> Ints:
    """The largest whole number that each channel's weight codes may be multiplied by, so that products fit too."""
    largest = np.abs(integers.reshape(len(integers), -1)).max(1)
    return np.maximum(min(127, _SATURATION // (2 * largest_input)) // np.maximum(largest, 1), 1)


def lift(highest: int) -> int:
    """By how many bits codes up to ``highest`` can be shifted up within 8."""
    return 8 - max(highest, 1).bit_length()


@torch.no_grad()
def settle_biases(student: nn.Module, images: Tensor) -> int:
    """Move the shifts behind quantized convolutions onto the grid on which an engine adds its int32 bias.

    The running mean of the batch norm behind a convolution (else the convolution's own bias) changes by half a unit at
    most, ``input step * weight step / 2``: about a hundredth of an 8-bit output step, and less at fewer bits. Integer
    biases in these units are those of Jacob et al., CVPR 2018 (section 2.4); that the network is moved onto them,
    instead of being rounded at export, is ours. ``fit`` does it at its end; a training loop of one's own does it before
    its last evaluation.

    Left alone: convolutions whose weight or input has no fixed grid, channels that are constant, a batch norm that
    reads several layers, and what follows any other operator. And networks with EWGS activations: these subtract a
    learned lower end first, which belongs to the bias in front of them and is on no grid.

    Args:
        student: quantized and calibrated; changed in place, running means and biases alone.
        images: N x C x H x W, normalised as in training; one is enough, only to see which batch norm reads which layer.

    Returns:
        How many convolutions were settled.

    Raises:
        TypeError: a student that is no network, images that are no tensor.
        ValueError: a student that was never calibrated; images of another shape than N x C x H x W, or none.
    """
    checks.check_network("student", student)
    checks.check("images", images, Tensor)
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must be a batch of images, N x C x H x W, got {tuple(images.shape)}")
    check_calibrated(student)
    engines = {quantizer.engine for _, quantizer in quantizers_of(student)}
    if not engines or "transformed" in engines:
        return 0
    readers = _norms_behind(student, images)
    shared = {id(norm) for name, norm in readers for other, same in readers if norm is same and name != other}
    settled = set()
    for name, layer in student.named_modules():
        grid = _grid(layer) if isinstance(layer, QuantConv2d) else None
        if grid is None:
            continue
        norms = [norm for reads, norm in readers if reads == name]
        for norm in norms:
            if id(norm) not in shared:  # no mean is right for two layers
                assert norm.running_mean is not None
                norm.running_mean -= _moved(cast(QuantConv2d, layer), norm, grid)
                settled.add(name)
        if not norms and layer.bias is not None:
            layer.bias += _moved(cast(QuantConv2d, layer), None, grid)
            settled.add(name)
    return len(settled)


@dataclass(frozen=True)
class _Grid:
    """Units of a layer's sums and the factors that its weights have room for, one for each output channel."""

    unit: Floats
    factors: Ints


def _grid(layer: QuantConv2d) -> _Grid | None:
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    if weight is None or activation is None or not (bool(weight.enabled) and bool(activation.enabled)):
        return None
    if weight.engine not in ("integer", "shifted") or activation.engine == "float":
        return None
    integers, scale = whole(weight, weight.encode(layer.weight))
    zero = activation.encode(layer.weight.new_zeros(1, layer.in_channels, 1, 1))
    step, largest_input = float(zero.scale), zero.high - zero.low
    if weight.bits >= LIFTED_BITS:
        shift = lift(largest_input)
        step, largest_input = step / 2**shift, largest_input << shift
    unit = np.broadcast_to(scale * step, len(integers))
    return _Grid(np.asarray(unit, np.float64), largest_factors(integers, largest_input))


def _moved(layer: QuantConv2d, norm: nn.BatchNorm2d | None, grid: _Grid) -> Tensor:
    """What has to be added to the bias, in the layer's own numbers, so that it lies on the grid."""
    total = np.zeros(len(grid.unit)) if layer.bias is None else _array(layer.bias)
    spread = np.full(len(grid.unit), np.inf)
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        spread = np.sqrt(_array(norm.running_var) + norm.eps)
        gamma, beta = (_array(norm.weight), _array(norm.bias)) if norm.affine else (1.0, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            total = total - _array(norm.running_mean) + beta * spread / gamma
    wanted = total / grid.unit
    # A channel whose batch norm scales it to nothing is constant, and one beyond int32 runs in float.
    fits = np.isfinite(wanted) & (np.abs(wanted) < LARGEST_BIAS)
    wanted = np.where(fits, wanted, 0.0)
    moved = (_nearest(wanted, grid.factors) - wanted) * grid.unit
    moved = np.where(np.abs(moved) <= _NEGLIGIBLE * spread, moved, 0.0)
    return torch.as_tensor(moved).to(layer.weight if norm is None else norm.running_mean)


def _array(tensor: Tensor) -> Floats:
    return cast(Floats, tensor.double().cpu().numpy())


def _nearest(wanted: Floats, factors: Ints) -> Floats:
    """The nearest fraction whose denominator a channel's weights have room for; of equals the plainest."""
    best = np.round(wanted)
    for factor in range(2, int(factors.max()) + 1):
        found = np.round(wanted * factor) / factor
        is_nearer = (np.abs(found - wanted) < np.abs(best - wanted) - 1e-9) & (factor <= factors)
        best = np.where(is_nearer, found, best)
    return best


def _norms_behind(student: nn.Module, images: Tensor) -> list[tuple[str, nn.BatchNorm2d]]:
    """The convolutions by name, each with a batch norm that reads its result, by one pass."""
    results: dict[int, tuple[str, Tensor, int]] = {}
    found: list[tuple[str, nn.BatchNorm2d]] = []

    def give(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # Kept alive, so that no other tensor gets its id; and what changes it in place raises its version.
            results[id(output)] = (name, output, output._version)

        return hook

    def take(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named.get("input")
        name, _, version = results.get(id(x), ("", None, -1))
        pair = (name, cast(nn.BatchNorm2d, module))
        if isinstance(x, Tensor) and x._version == version and pair not in found:
            found.append(pair)

    handles = []
    for name, module in student.named_modules():
        if isinstance(module, QuantConv2d):
            # First of all hooks: a stream's quantizer stands between the convolution and who reads it then.
            handles.append(module.register_forward_hook(give(name), prepend=True))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(take, with_kwargs=True))
    modes = [(module, module.training) for module in student.modules()]
    try:
        student.eval()
        student(images[:1].to(next(student.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return found
