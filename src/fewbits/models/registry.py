"""Networks by name, and which of them come with weights."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fewbits.data import IMAGENET, Normalisation, roots
from fewbits.models.resnet_cifar import resnet18, resnet20, resnet32, resnet56
from fewbits.models.timm_models import PREFIX, build_timm, pretrained_timm
from fewbits.models.vgg import vgg_small
from fewbits.models.weights import load_weights
from fewbits.names import unknown_name


@dataclass(frozen=True)
class Pretrained:
    """Weights that a named network comes with.

    Args:
        file: below a data root.
        data: the set that they were trained on.
        normalisation: of their input.
        accuracy: on that set's test images, 0..1.
    """

    file: str
    data: str
    normalisation: Normalisation
    accuracy: float


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "vgg-small": vgg_small,
}
PRETRAINED: dict[str, tuple[Pretrained, ...]] = {
    "resnet20": (Pretrained("pretrained-cifar10/resnet20-12fca82f.th", "cifar10", IMAGENET, 0.9173),),
    "resnet56": (Pretrained("pretrained-cifar10/resnet56-4bfd9763.th", "cifar10", IMAGENET, 0.9339),),
}


def names() -> tuple[str, ...]:
    """The names that `build` takes; besides these, `timm:NAME`."""
    return tuple(MODELS)


def build(name: str, *, num_classes: int, channels: int = 3, image_size: int | None = None) -> nn.Module:
    """A network with random weights from PyTorch's global generator.

    Args:
        name: one of `names()`, or `timm:NAME`. Behind a ResNet's name, `-w1.5` makes it so many times as wide.
        num_classes: 2 or more.
        channels: 1 for grey images, 3 for RGB.
        image_size: pixels a side, which some of timm's transformers need to know.

    Raises:
        ValueError: an unknown name, with close ones; numbers out of range.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if name.startswith(PREFIX):
        return build_timm(name.removeprefix(PREFIX), num_classes=num_classes, channels=channels, image_size=image_size)
    base, width = _split_width(name)
    check_name(base)
    return MODELS[base](num_classes, channels, *width)


def _split_width(name: str) -> tuple[str, tuple[float, ...]]:
    """`resnet20-w1.5` as `resnet20` and 1.5; a name without a width as it is."""
    found = re.fullmatch(r"(resnet\d+)-w(\d+(?:\.\d+)?)", name)
    if found is None:
        return name, ()
    width = float(found[2])
    if not 0 < width <= 16:
        raise ValueError(f"the width in model {name!r} must lie above 0 and be at most 16, got {width:g}")
    return found[1], (width,)


def check_name(name: str) -> None:
    """Raises ValueError for a network that is not one of ours."""
    if name not in MODELS:
        raise ValueError(unknown_name("model", name, MODELS, "timm:NAME"))


def pretrained(name: str, data: str, root: Path | None = None) -> tuple[dict[str, Tensor], Normalisation] | None:
    """The network's own weights for a data set, and the normalisation that they expect.

    A network of timm has one set of weights, whatever the data; its classifier is usually of another shape: `adapt`.

    Args:
        data: name of a data set.
        root: the only data folder to look in; None looks in all.

    Returns:
        None where there are none, or their file is in no data folder.

    Raises:
        ValueError: an unknown name; a damaged file; weights of timm that cannot be fetched.
    """
    if name.startswith(PREFIX):
        return pretrained_timm(name.removeprefix(PREFIX))
    check_name(_split_width(name)[0])
    for entry in PRETRAINED.get(name, ()):
        path = next((place / entry.file for place in roots(root) if (place / entry.file).is_file()), None)
        if entry.data == data and path is not None:
            return load_weights(path), entry.normalisation
    return None
