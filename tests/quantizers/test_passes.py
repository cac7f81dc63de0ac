"""One pass over memory or many: the bits of the equations, written here with a plain operator of PyTorch at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fewbits.quantizers import Quantizer, QuantSpec, build, tiles
from fewbits.quantizers.feature import FeatureQuantizer

LOWER, UPPER, ALPHA, SCALE, DELTA = -0.7, 1.3, 1.7, -0.6, 0.25


@dataclass
class Passed:
    """What comes out of a pass forward and one backward."""

    y: Tensor
    x: Tensor
    learned: dict[str, Tensor] = field(default_factory=dict)


def codes_of(x: Tensor, lower: Tensor, step: Tensor, n: int) -> Tensor:
    return ((x - lower) / step).round().clamp(0, n)


def slow_pact(x: Tensor, g: Tensor, n: int, enabled: bool = True) -> Passed:
    alpha = torch.tensor(ALPHA)
    step = alpha / n
    y = (x / step).round().clamp(0, n) * step if enabled else torch.minimum(x.clamp(min=0.0), alpha)
    above = x >= alpha
    return Passed(y, g * ((x >= 0) & ~above), {"alpha": (g * above).sum()})


def slow_pact_off(x: Tensor, g: Tensor, n: int) -> Passed:
    """Both branches of the gate have a gradient, one of them of zeros."""
    return slow_pact(x, g, n, enabled=False)


def slow_interval(x: Tensor, g: Tensor, n: int, scale: Tensor, offset: Tensor, delta: float) -> Passed:
    """EWGS's equations on codes; ``scale`` is what they are multiplied with."""
    lower, upper, delta_ = torch.tensor(LOWER), torch.tensor(UPPER), torch.tensor(delta)
    width = upper - lower
    codes = codes_of(x, lower, width / n, n)
    unit = (x - lower) / width
    inside = (unit >= 0) & (unit <= 1)
    grad = g * scale * n
    grad_x = grad * (1 + delta_ * grad.sign() * (unit.clamp(0.0, 1.0) - codes / n)) * inside / width
    grad_width = -(grad_x * unit).sum()
    learned = {"lower": -grad_x.sum() - grad_width, "upper": grad_width, "scale": (g * codes).sum(), "offset": g.sum()}
    return Passed(codes * scale + offset, grad_x, learned)


def slow_ewgs_activation(x: Tensor, g: Tensor, n: int) -> Passed:
    slow = slow_interval(x, g, n, torch.tensor(1.0 / n), torch.tensor(0.0), DELTA)
    del slow.learned["scale"], slow.learned["offset"]
    return slow


def slow_ewgs_weight(x: Tensor, g: Tensor, n: int) -> Passed:
    magnitude = torch.tensor(SCALE).abs()
    slow = slow_interval(x, g, n, magnitude * (2.0 / n), -magnitude, DELTA)
    slow.learned["output_scale"] = -(slow.learned.pop("scale") * (2.0 / n) - slow.learned.pop("offset"))  # s < 0
    return slow


def slow_feature(x: Tensor, g: Tensor, n: int) -> Passed:
    slow = slow_interval(x, g, n, torch.tensor(SCALE).abs() * (1.0 / n), torch.tensor(0.0), 0.0)
    slow.learned["output_scale"] = -(slow.learned.pop("scale") * (1.0 / n))
    del slow.learned["offset"]
    return slow


def slow_minmax(x: Tensor, g: Tensor, n: int) -> Passed:
    """The range by autograd itself: amin and amax share their gradients among ties."""
    ranged = x.clone().requires_grad_()
    lowest = ranged.amin()
    step = (ranged.amax() - lowest) / n
    step = torch.where(step > 1e-8, step, 1.0)
    low, s = lowest.detach(), step.detach()
    codes = codes_of(x, low, s, n)
    (through_range,) = torch.autograd.grad(step, ranged, (g * (codes - (x - low) / s)).sum())
    return Passed(codes * s + low, g + through_range)


def slow_dorefa(x: Tensor, g: Tensor, n: int) -> Passed:
    step = torch.tensor(1.0 / n)
    y = codes_of(x.clamp(0.0, 1.0), torch.tensor(0.0), step, n) * step
    return Passed(y, torch.where((x >= 0) & (x <= 1), g * step / step, 0.0))


def signs_of(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def slow_sign(x: Tensor, g: Tensor, n: int) -> Passed:
    return Passed(signs_of(x), g * (x.abs() <= 1))


def slow_xnor(x: Tensor, g: Tensor, n: int) -> Passed:
    return Passed(signs_of(x), g * (x.abs() < 1))


def slow_xnor_weight(w: Tensor, g: Tensor, n: int) -> Passed:
    alpha = w.abs().reshape(len(w), -1).mean(1).view(-1, 1, 1, 1)
    signs = signs_of(w)
    through_mean = signs * (g * signs).mean((1, 2, 3), keepdim=True)
    return Passed(signs * alpha, through_mean + alpha * g * (w.abs() <= 1))


def slow_bireal(x: Tensor, g: Tensor, n: int) -> Passed:
    return Passed(signs_of(x), g * (2.0 - 2.0 * x.abs()).clamp(min=0.0))


def slow_bireal_weight(w: Tensor, g: Tensor, n: int) -> Passed:
    return Passed(signs_of(w) * w.abs().reshape(len(w), -1).mean(1).view(-1, 1, 1, 1), g * (w.abs() <= 1))


Slow = Callable[[Tensor, Tensor, int], Passed]
SLOW: dict[tuple[str, str], Slow] = {
    ("pact", "activation"): slow_pact,
    ("pact, off", "activation"): slow_pact_off,
    ("ewgs", "activation"): slow_ewgs_activation,
    ("ewgs", "weight"): slow_ewgs_weight,
    ("feature", "activation"): slow_feature,
    ("minmax", "activation"): slow_minmax,
    ("minmax", "weight"): slow_minmax,
    ("dorefa", "activation"): slow_dorefa,
    ("sign", "activation"): slow_sign,
    ("xnor", "activation"): slow_xnor,
    ("xnor", "weight"): slow_xnor_weight,
    ("bireal", "activation"): slow_bireal,
    ("bireal", "weight"): slow_bireal_weight,
}
ONE_BIT = ("sign", "xnor", "bireal")
CASES = [(*kind, bits) for kind in SLOW for bits in ((1,) if kind[0] in ONE_BIT else (1, 2, 4, 8))]
# The last is cut in tiles of their true size, and is no multiple of it.
SHAPES_AND_TILES = [
    ((1, 1, 1, 1), tiles.TILE),
    ((2, 3, 8, 8), tiles.TILE),
    ((2, 3, 8, 8), 16),
    ((3, 5, 7, 3), 16),
    ((9, 16, 31, 32), tiles.TILE),
]
LAYOUTS = ["contiguous", "channels_last", "strided", "gradient of a concatenation"]

every_case = pytest.mark.parametrize(("name", "role", "bits"), CASES)


def make(name: str, role: str, bits: int, num_channels: int) -> Quantizer:
    if name == "feature":
        quantizer: Quantizer = FeatureQuantizer(bits)
    else:
        quantizer = build(QuantSpec(name.removesuffix(", off"), bits, role), num_channels, 0 if role == "weight" else 1)
    values = {"lower": LOWER, "upper": UPPER, "alpha": ALPHA, "output_scale": SCALE}
    with torch.no_grad():
        for parameter, tensor in quantizer.named_parameters():
            tensor.fill_(values[parameter])
    if name == "ewgs":
        quantizer.get_buffer("delta").fill_(DELTA)
    quantizer.enabled.fill_(not name.endswith("off"))
    return quantizer


def inputs(name: str, bits: int, shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor]:
    """Values with ties of rounding, every bound and saturated ones among them; a gradient."""
    n = 2**bits - 1
    start, width = {"pact": (0.0, ALPHA), "dorefa": (0.0, 1.0)}.get(name, (LOWER, UPPER - LOWER))
    x, g = 2 * torch.randn(shape), torch.randn(shape)
    flat = x.view(-1)
    step = torch.tensor(width) / n
    flat[::3] = ((flat[::3] - start) / step * 2).round() * (step / 2) + start
    for place, bound in enumerate((0.0, -0.0, 1.0, -1.0, LOWER, UPPER, ALPHA, 1e6, -1e6)):
        flat[1 + place :: 17] = bound
    if name == "minmax":
        x.clamp_(LOWER, UPPER)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2], g
    return x, torch.cat([g, g], 1)[:, : shape[1]] if layout.startswith("gradient") else g


def passed(quantizer: Quantizer, x: Tensor, g: Tensor) -> Passed:
    x = x.detach().requires_grad_()
    y = quantizer(x)
    y.backward(g)
    assert x.grad is not None
    learned = {name: value.grad for name, value in quantizer.named_parameters() if value.grad is not None}
    return Passed(y.detach(), x.grad, learned)


def assert_same_bits(fast: Passed, slow: Passed) -> None:
    assert torch.equal(fast.y, slow.y)
    assert torch.equal(fast.x, slow.x)
    assert fast.learned.keys() == slow.learned.keys()
    for name, grad in slow.learned.items():
        assert torch.equal(fast.learned[name], grad), name


@pytest.mark.parametrize("layout", LAYOUTS)
@every_case
def test_same_bits(name: str, role: str, bits: int, layout: str, monkeypatch: pytest.MonkeyPatch):
    for shape, tile in SHAPES_AND_TILES:
        monkeypatch.setattr(tiles, "TILE", tile)
        x, g = inputs(name, bits, shape, layout)
        fast = passed(make(name, role, bits, shape[0]), x, g)
        assert_same_bits(fast, SLOW[name, role](x, g, 2**bits - 1))
        if layout == "channels_last":
            assert fast.y.is_contiguous(memory_format=torch.channels_last)
            assert fast.x.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_same_bits_under_autocast(name: str, role: str, bits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "TILE", 16)
    x, g = inputs(name, bits, (2, 3, 8, 8), "contiguous")
    with torch.autocast("cpu", torch.bfloat16):
        fast = passed(make(name, role, bits, 2), x, g)
    assert_same_bits(fast, SLOW[name, role](x, g, 2**bits - 1))


@every_case
def test_only_the_input_is_kept(name: str, role: str, bits: int):
    """Between forward and backward; the others have one number for the whole tensor or for a channel."""
    x, _ = inputs(name, bits, (2, 3, 8, 8), "contiguous")
    x.requires_grad_()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = make(name, role, bits, 2)(x)
    assert y.requires_grad
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 2} == {x.data_ptr()}


@pytest.mark.parametrize("shape", [(5,), (3, 7, 5, 5)])
def test_count(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "TILE", 16)
    x = torch.randn(shape).relu()
    for given in (x, x[..., ::2]):
        number = tiles.count(torch.eq, given, torch.tensor(0.0))
        assert number.dtype == torch.int64
        assert number.item() == sum(v == 0 for v in given.flatten().tolist())
