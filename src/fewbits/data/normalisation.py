"""Mean and standard deviation of pixels, per channel."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """`(pixel - mean) / std` for pixels in 0..1.

    Args:
        mean, std: one number a channel.

    Raises:
        ValueError: different lengths, or a std that is not positive.

    >>> Normalisation((0.5,), (0.25,)).apply(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean and std must have one number a channel each, got {self.mean} and {self.std}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {self.std}")

    @classmethod
    def identity(cls, channels: int) -> Self:
        """Leaves pixels as they are; what a graph with its own normalisation wants."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def measure(cls, images_NCHW: Tensor) -> Self:
        """Mean and standard deviation of uint8 images or float images in 0..1, rounded to four digits.

        A constant channel gets a std of 1, so that it stays finite.
        """
        moments = [_mean_and_std(channel_NHW) for channel_NHW in images_NCHW.unbind(1)]
        return cls(tuple(round(mean, 4) for mean, _ in moments), tuple(round(std, 4) or 1.0 for _, std in moments))

    def apply(self, images_NCHW: Tensor) -> Tensor:
        """Normalises float images in 0..1.

        Raises:
            ValueError: another number of channels.
        """
        channels = images_NCHW.shape[1]
        if channels != len(self.mean):
            raise ValueError(f"images must have {len(self.mean)} channels for this normalisation, got {channels}")
        mean_C11 = images_NCHW.new_tensor(self.mean).view(-1, 1, 1)
        std_C11 = images_NCHW.new_tensor(self.std).view(-1, 1, 1)
        # In place on the fresh difference: a second buffer of this size costs more in page faults than the division.
        return (images_NCHW - mean_C11).div_(std_C11)


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    """Of pixels in 0..1; bytes through their histogram, which is exact and needs no copy in double precision."""
    if values.dtype != torch.uint8:
        std, mean = torch.std_mean(values.double(), correction=0)
        return mean.item(), std.item()
    share = values.flatten().bincount(minlength=256).double() / values.numel()
    pixels = torch.arange(256) / 255.0
    mean = (share * pixels).sum()
    return mean.item(), (share * (pixels - mean) ** 2).sum().sqrt().item()


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
