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
        scale = 255.0 if images_NCHW.dtype == torch.uint8 else 1.0
        means, stds = [], []
        for channel_NHW in images_NCHW.unbind(1):
            std, mean = torch.std_mean(channel_NHW.double() / scale, correction=0)
            means.append(round(mean.item(), 4))
            stds.append(round(std.item(), 4) or 1.0)
        return cls(tuple(means), tuple(stds))

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


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
