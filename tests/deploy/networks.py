"""Small networks with the structures that exporters trip over, quantized and calibrated on random images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbits.calibration as calibration
import fewbits.convert as convert
from fewbits.quantizers import METHODS

CHANNELS, SIZE, CLASSES = 3, 8, 5


class Shortcut(nn.Module):
    """Option A: every second pixel, zeros for the new channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


class Residual(nn.Module):
    """A stem, an identity block, a block with an option-A shortcut, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.shortcut = Shortcut()
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu1(self.bn1(self.conv1(x)) + x)
        x = self.relu2(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.head(torch.flatten(self.pool(x), 1))


class Block(nn.Module):
    """Two convolutions and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + x)


class Plain(nn.Module):
    """A chain of convolutions given by the test, between a stem and a classifier."""

    def __init__(self, *body: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.body = nn.Sequential(*body)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.body(self.relu(self.stem(x))))))


class Tokens(nn.Module):
    """Patches as tokens, a two-layer perceptron on each, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, 12, 4, stride=4)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 24)
        self.act = nn.ReLU()
        self.down = nn.Linear(24, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.down(self.act(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Concat(nn.Module):
    """Two branches, one of them pooled, put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.relu_left, self.relu_right = nn.ReLU(), nn.ReLU()
        self.pool_left, self.pool_right = nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.pool_left(self.relu_left(self.left(x)))
        return torch.cat([left, self.pool_right(self.relu_right(self.right(x)))], 1)


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(self.relu(self.bn(self.conv(x))))))


def images(count: int = 16, size: int = SIZE) -> Tensor:
    """Smooth random pictures in 0..1."""
    coarse = torch.rand(count, CHANNELS, size // 2, size // 2)
    noise = 0.2 * torch.rand(count, CHANNELS, size, size)
    return (F.interpolate(coarse, size=(size, size), mode="bilinear") + noise).clamp(0, 1)


def live(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Batch norms with random factors of both signs and with statistics of real batches."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.6, 0.6)
            nn.init.normal_(module.bias, 0.2, 0.3)
    model.train()
    with torch.no_grad():
        for batch in batches:
            for _ in range(10):
                model(batch)
    return model.eval()


def student(model: nn.Module, weights: int, activations: int, method: str = "lsq", **options: Any) -> nn.Module:
    """``model`` quantized by ``method`` and calibrated."""
    x = images(32)
    live(model, [x])
    quantized = convert.quantize(model, weights, activations, quantizer=method, **options)
    calibration.calibrate(quantized, [x])
    return quantized.eval()


def cases() -> list[tuple[str, int]]:
    """Every method at the widths that the contract runs over."""
    wanted = {name: range(1, 9) if name == "lsq" else (1, 2, 4, 8) for name in METHODS}
    return [(name, bits) for name, method in METHODS.items() for bits in wanted[name] if bits in method.bits]
