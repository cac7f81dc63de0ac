"""Residual networks for small images.

K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and table 6.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels, half of them on each side; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them; each ReLU is its own module, so that each can be quantized."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks that halve the resolution, global average pooling and a classifier.

    The modules are `conv1`, `bn1`, `relu`, `layer1` to `layerS` (each a sequence of blocks), `pool`, `flatten` and
    `linear`. Any image size works; 32 is the one that it is meant for.

    Args:
        blocks: number of blocks of each stage.
        widths: channels of each stage.
        projection: a 1x1 convolution with batch norm where the shape changes (option B), else option A.
        num_classes, channels: of the data.
        architecture: the name that errors give it.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        projection: bool,
        *,
        num_classes: int,
        channels: int = 3,
        architecture: str,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = tuple(f"layer{number}" for number in range(1, len(blocks) + 1))
        in_channels = widths[0]
        for name, num_blocks, width in zip(self.stages, blocks, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            self.add_module(name, _stage(num_blocks, in_channels, width, stride, projection))
            in_channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(in_channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(self.flatten(self.pool(x)))


def _stage(num_blocks: int, in_channels: int, width: int, stride: int, projection: bool) -> nn.Sequential:
    first = BasicBlock(in_channels, width, stride, _shortcut(in_channels, width, stride, projection))
    return nn.Sequential(first, *(BasicBlock(width, width, 1, nn.Identity()) for _ in range(num_blocks - 1)))


def _shortcut(in_channels: int, out_channels: int, stride: int, projection: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if not projection:
        return PadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def initialise(model: nn.Module) -> None:
    """Kaiming normal weights for convolutions and classifiers, zero biases; batch norms start as the identity.

    K. He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 10.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resnet20(num_classes: int, channels: int = 3, width: float = 1.0) -> CifarResNet:
    """20 layers, option A: 269,722 parameters for 10 classes of RGB images; ``width`` multiplies all channels."""
    return _option_a(20, num_classes, channels, width)


def resnet32(num_classes: int, channels: int = 3, width: float = 1.0) -> CifarResNet:
    """32 layers, option A: 464,154 parameters for 10 classes of RGB images."""
    return _option_a(32, num_classes, channels, width)


def resnet56(num_classes: int, channels: int = 3, width: float = 1.0) -> CifarResNet:
    """56 layers, option A: 853,018 parameters for 10 classes of RGB images."""
    return _option_a(56, num_classes, channels, width)


def resnet18(num_classes: int, channels: int = 3, width: float = 1.0) -> CifarResNet:
    """ImageNet's ResNet-18 with a 3x3 stem and no max-pooling: 11,173,962 parameters for 10 classes of RGB images."""
    return CifarResNet(
        (2, 2, 2, 2),
        _widened((64, 128, 256, 512), width),
        projection=True,
        num_classes=num_classes,
        channels=channels,
        architecture="resnet18",
    )


def _option_a(depth: int, num_classes: int, channels: int, width: float) -> CifarResNet:
    return CifarResNet(
        ((depth - 2) // 6,) * 3,
        _widened((16, 32, 64), width),
        projection=False,
        num_classes=num_classes,
        channels=channels,
        architecture=f"resnet{depth}",
    )


def _widened(widths: tuple[int, ...], width: float) -> tuple[int, ...]:
    """Even numbers of channels: option A pads the new ones half on each side."""
    return tuple(max(2, 2 * round(channels * width / 2)) for channels in widths)
