"""Ranges from real images: ``calibrate``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers import QuantLayer
from .quantizers import Quantizer
from .quantizers.start import sample

CALIBRATION_SAMPLES = 256
"""Images that calibration looks at when the batches hold more."""


@dataclass
class _Collector:
    """Real inputs of one quantizer: a sample of all batches, and the first batch as it was."""

    values: list[Tensor] = field(default_factory=list)
    first: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float()
        self.values.append(sample(x))
        if self.first is None:
            self.first = x[:32].clone()


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], *, again: bool = False) -> int:
    """Set the ranges of quantizers from real batches, once; what is calibrated already stays.

    The network runs in eval mode with these quantizers off, so that at the start each sees what the float network
    would feed it, and one that joins later sees what the quantized ones before it do feed it.

    Binary quantizers with nothing to set stay on: signs are no approximation of what they replace, and a network of
    double shortcuts gives numbers without bound without them. Batch norm then takes each batch's own statistics, since
    those of the float network are not this one's.

    Args:
        model: a quantized network.
        batches: images, N x C x H x W, normalised as in training; about 256 are enough.
        again: whether to set calibrated quantizers anew.

    Returns:
        How many quantizers were set.

    Raises:
        ValueError: no batch at all, or values that a quantizer cannot represent; the layer is named.
    """
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    chosen = {n: q for n, q in quantizers.items() if again or not bool(q.calibrated)}
    if not chosen:
        return 0
    activations = {n: q for n, q in chosen.items() if q.spec.role == "activation"}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    collected = {n: _Collector() for n in activations} | {n: _Collector() for n in layers}
    handles = [model.get_submodule(n).register_forward_pre_hook(c) for n, c in collected.items()]
    # Off, PACT still clips, to a range that is not known yet: what comes behind it would see wrong values.
    handles += [q.register_forward_hook(_pass_on) for q in activations.values() if q.needs_data]
    gates = {n: q.enabled.clone() for n, q in quantizers.items()}
    modes = {n: m.training for n, m in model.named_modules()}
    signs = {n: q for n, q in chosen.items() if q.bits == 1 and not q.needs_data}
    norms = [m for m in model.modules() if signs and isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    try:
        for name in chosen.keys() - signs.keys():
            chosen[name].enabled.fill_(False)
        model.eval()
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        if _feed(model, batches) == 0:
            raise ValueError("batches holds no image; calibration needs real data")
    finally:
        for handle in handles:
            handle.remove()
        for name, quantizer in quantizers.items():
            quantizer.enabled.copy_(gates[name])
        for name, module in model.named_modules():
            module.training = modes[name]
        for norm in norms:
            norm.track_running_stats = True
    for name, layer in layers.items():
        with _named(name):
            if f"{name}.weight_quantizer" in chosen:
                layer.calibrate_weight()
    for name, quantizer in activations.items():
        values = collected[name].values
        with _named(name):
            if not values:
                raise ValueError("never ran on the calibration batches; keep=... it, or remove it from the model")
            quantizer.calibrate(torch.cat(values))
    for name, layer in layers.items():
        first = collected[name].first
        if f"{name}.weight_quantizer" in chosen and first is not None:
            layer.match_output(first)
    return len(chosen)


def _pass_on(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return cast(Tensor, args[0])


def images_of(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches one by one; raises TypeError where they are no images."""
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of batches, got one tensor; pass [images]")
    for images in batches:
        if not isinstance(images, Tensor):
            raise TypeError(f"batches must hold images N x C x H x W, got {type(images).__name__}; leave labels out")
        yield images


def _feed(model: nn.Module, batches: Iterable[Tensor]) -> int:
    device = next(model.parameters()).device
    num = 0
    for images in images_of(batches):
        images = images[: CALIBRATION_SAMPLES - num] if num < CALIBRATION_SAMPLES else images[:0]
        if len(images) == 0:
            break
        if not bool(torch.isfinite(images).all()):
            raise ValueError("batches holds NaN or infinite pixels; clean the data before calibration")
        model(images.to(device))
        num += len(images)
    return num


class _named:
    """Add the layer's qualified name to an error, once, at this boundary."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"layer {self.name}: {error}") from error
