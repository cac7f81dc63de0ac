"""Every kind of layer that vision networks are made of, in small networks, in the sizes that a test draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4


@dataclass(frozen=True)
class Sizes:
    """What hypothesis draws.

    Args:
        channels: of the stem, even.
        height, width: of the images.
        kernel: the side of kernels, odd.
        stride: of layers that may have one.
        bias: whether convolutions have one.
    """

    channels: int = 8
    height: int = 6
    width: int = 7
    kernel: int = 3
    stride: int = 1
    bias: bool = False


class Chain(nn.Module):
    """A stem, the layers under test one after the other, and a head."""

    def __init__(self, kinds: Sequence[str], sizes: Sizes) -> None:
        super().__init__()
        channels = sizes.channels
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential()
        x = torch.zeros(1, channels, sizes.height, sizes.width)
        for kind in kinds:
            part = nn.Sequential(*KINDS[kind](replace(sizes, channels=channels))).eval()
            self.body.add_module(kind.replace(" ", "_"), part)
            with torch.no_grad():
                x = part(x)
            channels = x.shape[1]
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.body(self.stem(x)))))


class Add(nn.Module):
    """Two branches, added; ``act`` behind the sum."""

    def __init__(self, left: nn.Module, right: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.act = left, right, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.left(x) + self.right(x))


class Cat(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Excite(nn.Module):
    """Squeeze-and-excitation, written with 1x1 convolutions as timm does."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.act, self.gate = nn.ReLU(), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    """ShuffleNet's: halves of the channels, one of them convolved, interleaved."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.body(right)], 1)
        n, c, h, w = y.shape
        return y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class OnTokens(nn.Module):
    """Pixels as tokens: N x C x H x W -> N x HW x C and back."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)


class Attention(nn.Module):
    """Softmax attention of two heads, written out or by PyTorch's own function."""

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.proj, self.fused = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels), fused

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * (c // 2) ** -0.5).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(n, t, c))


class ClippedSum(nn.Module):
    """A sum that is carried on, and clipped to bounds of its own for a convolution."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.relu, self.clip = first, second, nn.ReLU(), nn.Hardtanh(0.15, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x) + x)
        return self.second(self.clip(x)) + x


class Scale(nn.Module):
    """ConvNeXt's and CaiT's layer scale, for each channel at the end of the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _conv(sizes: Sizes, outputs: int | None = None, kernel: int | None = None, **options: Any) -> nn.Conv2d:
    side = kernel or sizes.kernel
    options = {"padding": side // 2, "bias": sizes.bias} | options
    return nn.Conv2d(sizes.channels, outputs or sizes.channels, side, **options)


def _normed(sizes: Sizes, kernel: int | None = None, outputs: int | None = None, **options: Any) -> list[nn.Module]:
    return [_conv(sizes, outputs, kernel, **options), nn.BatchNorm2d(outputs or sizes.channels)]


def _unit(sizes: Sizes, kernel: int | None = None, outputs: int | None = None, **options: Any) -> list[nn.Module]:
    return [*_normed(sizes, kernel, outputs, **options), nn.ReLU()]


def _activated(sizes: Sizes, act: nn.Module) -> list[nn.Module]:
    """A convolution on what ``act`` makes of another's result."""
    return [*_normed(sizes), act, *_unit(sizes, 1)]


def _residual(sizes: Sizes, inner: nn.Module, act: nn.Module) -> list[nn.Module]:
    return [Add(nn.Sequential(*_normed(sizes), inner, *_normed(sizes, 1)), nn.Identity(), act)]


def _mlp(channels: int, act: nn.Module) -> nn.Module:
    layers = [nn.Linear(channels, 2 * channels), act, nn.Linear(2 * channels, channels)]
    return nn.Sequential(nn.LayerNorm(channels), *layers)


Kind = Callable[[Sizes], list[nn.Module]]

KINDS: dict[str, Kind] = {
    "plain": lambda s: _unit(s, stride=s.stride),
    "grouped": lambda s: _unit(s, groups=2),
    "depthwise": lambda s: _unit(s, groups=s.channels, stride=s.stride),
    "pointwise": lambda s: _unit(s, 1),
    "reflected": lambda s: _unit(s, 3, padding_mode="reflect"),
    "dilated": lambda s: _unit(s, dilation=2, padding=2 * (s.kernel // 2)),
    "multiplied": lambda s: _unit(s, outputs=2 * s.channels, groups=s.channels),
    "wider": lambda s: _unit(s, outputs=s.channels + 2, stride=s.stride),
    "replicated": lambda s: _unit(s, padding_mode="replicate"),
    "one row": lambda s: [nn.Conv2d(s.channels, s.channels, (1, 3), (s.stride, 1), (0, 1)), nn.ReLU()],
    "same": lambda s: _unit(s, padding="same", dilation=2),
    "without norm": lambda s: [_conv(s), nn.ReLU()],
    "without activation": lambda s: [*_normed(s), *_unit(s, 1)],
    "norm first": lambda s: [nn.BatchNorm2d(s.channels), nn.ReLU(), *_unit(s)],
    "unpadded": lambda s: _unit(s, 3, padding=0),
    "relu6": lambda s: _activated(s, nn.ReLU6()),
    "hardtanh": lambda s: _activated(s, nn.Hardtanh(-0.5, 1.0)),
    "silu": lambda s: _activated(s, nn.SiLU()),
    "hardswish": lambda s: _activated(s, nn.Hardswish()),
    "gelu": lambda s: _activated(s, nn.GELU()),
    "leaky": lambda s: _activated(s, nn.LeakyReLU(0.1)),
    "prelu": lambda s: _activated(s, nn.PReLU(s.channels)),
    "sigmoid": lambda s: _activated(s, nn.Sigmoid()),
    "mish": lambda s: _activated(s, nn.Mish()),
    "max pool": lambda s: [*_unit(s), nn.MaxPool2d(3, 1, 1), *_unit(s, 1)],
    "average pool": lambda s: [*_unit(s), nn.AvgPool2d(3, 2, 1), *_unit(s, 1)],
    "adaptive average": lambda s: [*_unit(s), nn.AdaptiveAvgPool2d((1, 1)), *_unit(s, 1)],
    "upsampled": lambda s: [*_unit(s), nn.Upsample(scale_factor=2), *_unit(s, 1)],
    "uncounted": lambda s: [*_unit(s), nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), *_unit(s, 1)],
    "adaptive max": lambda s: [*_unit(s), nn.AdaptiveMaxPool2d(1), *_unit(s, 1)],
    "residual": lambda s: _residual(s, nn.ReLU(), nn.ReLU()),
    "linear residual": lambda s: _residual(s, nn.ReLU6(), nn.Identity()),
    "projected": lambda s: [
        Add(nn.Sequential(*_normed(s, stride=2)), nn.Sequential(*_normed(s, 1, stride=2)), nn.ReLU())
    ],
    "concat": lambda s: [Cat(nn.Sequential(*_unit(s)), nn.Sequential(*_unit(s, 1)))],
    "dense": lambda s: [Cat(nn.Identity(), nn.Sequential(*_unit(s)))],
    "pooled branches": lambda s: [Cat(nn.Sequential(nn.MaxPool2d(3, 1, 1), *_unit(s, 1)), nn.Sequential(*_unit(s)))],
    "shuffle": lambda s: [Shuffle(nn.Sequential(*_unit(replace(s, channels=s.channels // 2)))), *_unit(s, 1)],
    "excited": lambda s: [*_unit(s), Excite(s.channels, nn.Sigmoid()), *_unit(s, 1)],
    "hard excited": lambda s: [*_normed(s), nn.Hardswish(), Excite(s.channels, nn.Hardsigmoid()), *_unit(s, 1)],
    "layer norm": lambda s: [OnTokens(_mlp(s.channels, nn.ReLU()))],
    "gelu mlp": lambda s: [OnTokens(Add(_mlp(s.channels, nn.GELU()), nn.Identity(), nn.Identity()))],
    "attention": lambda s: [OnTokens(Attention(s.channels, fused=False))],
    "fused attention": lambda s: [OnTokens(Attention(s.channels, fused=True))],
    "group norm": lambda s: [_conv(s), nn.GroupNorm(2, s.channels), nn.ReLU(), *_unit(s, 1)],
    "layer scale": lambda s: [
        OnTokens(
            Add(nn.Sequential(_mlp(s.channels, nn.ReLU()), Scale(s.channels)), nn.Identity(), nn.Identity()),
        )
    ],
    "clipped sum": lambda s: [ClippedSum(nn.Sequential(*_normed(s)), nn.Sequential(*_normed(s, 1)))],
    "two readers": lambda s: [*_unit(s), Add(nn.Sequential(*_unit(s)), nn.Sequential(*_unit(s, 1)), nn.Identity())],
    "norm of a map": lambda s: [_conv(s), OnTokens(nn.LayerNorm(s.channels)), *_unit(s, 1)],
}
"""What stands between a stem and a head, by its name; kinds that shrink the map to nothing stand last in their row."""

ROWS = tuple(tuple(KINDS)[first : first + 3] for first in range(0, len(KINDS), 3))
"""Kinds that share a network, for tracing one takes a second."""


def images(sizes: Sizes, count: int = 12) -> Tensor:
    """Pixels of k / 255, as real ones are."""
    coarse, fine = torch.rand(count, 3, 3, 3), 0.2 * torch.rand(count, 3, sizes.height, sizes.width)
    smooth = F.interpolate(coarse, size=(sizes.height, sizes.width), mode="bilinear")
    return (255 * (smooth + fine).clamp(0, 1)).round() / 255
