"""Random crops and flips of a whole batch at once, each sample's own whatever batch it is in."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.data.draws import draw_integers, sample_keys

# Streams of one sample's key; the image folder's resized crop uses others.
_TOP, _LEFT, _FLIP = 0, 1, 2


@dataclass(frozen=True)
class Augment:
    """What is done to training images.

    Args:
        pad: pixels of zeros (black, before normalisation) on each side; a crop of the original size is taken from that.
        flip: mirror half of the images left to right.
        min_area: below 1, cut a random part of at least this share of the picture's area and resize it
            (image folders only: small images in memory keep their size).

    Raises:
        ValueError: a negative pad, or a min_area outside (0, 1].
    """

    pad: int = 0
    flip: bool = False
    min_area: float = 1.0

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad must be 0 or more pixels, got {self.pad}")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area must be above 0 and at most 1, got {self.min_area}; 1 keeps the whole picture")


NONE = Augment()


def crop_and_flip(images_NCHW: Tensor, indices_N: Tensor, augment: Augment, *, seed: int, epoch: int) -> Tensor:
    """Zero-pads, crops back to the original size and flips, as (seed, epoch, sample index) say.

    Args:
        images_NCHW: pixels of any type; uint8 is the fastest.
        indices_N: int64, each image's index in its split, shape (N,).

    Returns:
        A tensor of the same shape and type.

    >>> image = torch.arange(1, 5).view(1, 1, 2, 2)
    >>> crop_and_flip(image, torch.tensor([7]), Augment(pad=1, flip=True), seed=0, epoch=0).flatten().tolist()
    [4, 3, 0, 0]
    """
    if (not augment.pad and not augment.flip) or not len(images_NCHW):
        return images_NCHW
    height, width = images_NCHW.shape[-2:]
    pad = augment.pad
    keys_N = sample_keys(seed, epoch, indices_N)
    if pad:
        num_samples = len(images_NCHW)
        padded = F.pad(images_NCHW, (pad, pad, pad, pad))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        top_N = draw_integers(keys_N, _TOP, 2 * pad + 1)
        left_N = draw_integers(keys_N, _LEFT, 2 * pad + 1)
        images_NCHW = windows[torch.arange(num_samples), :, top_N, left_N]
    if augment.flip:
        flipped = draw_integers(keys_N, _FLIP, 2).nonzero().squeeze(1)
        # Only the flipped half is moved: `where` over all images takes twice as long.
        images_NCHW = images_NCHW.index_copy(0, flipped, images_NCHW[flipped].flip(3))
    return images_NCHW
