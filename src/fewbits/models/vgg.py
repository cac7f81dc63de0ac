"""VGG-small, the small plain network of the binary-network papers.

The stages 2x128C3-MP-2x256C3-MP-2x512C3-MP of M. Courbariaux et al., "BinaryConnect", NeurIPS 2015, with one linear
classifier as in D. Zhang et al., "LQ-Nets", ECCV 2018.
"""

from collections import OrderedDict

from torch import Tensor, nn

from fewbits.models.resnet_cifar import initialise


class VGGSmall(nn.Module):
    """Three stages of two 3x3 convolutions, each with batch norm and ReLU, and max-pooling; one linear classifier.

    Differs from the papers: global average pooling before the classifier, where they flatten 512 x 4 x 4, so that any
    image of at least 8 x 8 pixels works and the classifier stays small.

    Args:
        num_classes, channels: of the data.
    """

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.architecture = "vgg-small"
        self.stage1 = _stage(channels, 128)
        self.stage2 = _stage(128, 256)
        self.stage3 = _stage(256, 512)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.stage3(self.stage2(self.stage1(x))))))


def _stage(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(width),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
        )
    )


def vgg_small(num_classes: int, channels: int = 3) -> VGGSmall:
    """4,583,306 parameters for 10 classes of RGB images."""
    return VGGSmall(num_classes, channels)
