"""A labelled set of images that is read in batches, the same ones however many processes share them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.data.augment import NONE, Augment, crop_and_flip
from fewbits.data.checks import check_images, check_labels
from fewbits.data.draws import sample_order
from fewbits.data.normalisation import Normalisation


def plan_batches(
    num_samples: int,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    drop_last: bool = False,
) -> Sequence[Tensor]:
    """The sample indices of each of one rank's batches.

    Global batch k is `order[k * batch_size : (k + 1) * batch_size]`; each rank takes a contiguous share of it, and the
    shares differ by at most one sample. So all ranks see equally many batches; of a last batch with fewer samples than
    ranks the later ranks get none, an empty batch.

    Raises:
        ValueError: sizes or ranks out of range; with `drop_last`, a batch_size that the ranks cannot share
            equally, or one that leaves no batch at all.

    >>> [b.tolist() for b in plan_batches(5, batch_size=4, rank=1, num_ranks=2)]
    [[2, 3], []]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_ranks < 1 or not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be between 0 and num_ranks - 1, got rank {rank} of {num_ranks}")
    if start_batch < 0:
        raise ValueError(f"start_batch must be 0 or more, got {start_batch}")
    if drop_last and batch_size % num_ranks:
        raise ValueError(f"batch_size must be a multiple of the {num_ranks} processes that share it, got {batch_size}")
    if drop_last and batch_size > num_samples:
        raise ValueError(
            f"batch_size must be at most the number of samples, {num_samples}, got {batch_size}; use a smaller one"
        )
    order = sample_order(num_samples, seed, epoch) if shuffle else torch.arange(num_samples)
    stop = num_samples - num_samples % batch_size if drop_last else num_samples
    starts = range(start_batch * batch_size, stop, batch_size)
    return [order[start : min(start + batch_size, stop)].tensor_split(num_ranks)[rank] for start in starts]


class Split(ABC):
    """Training or test images with their labels, int64 of shape (N,)."""

    labels: Tensor

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def batches(
        self,
        *,
        batch_size: int,
        normalisation: Normalisation,
        augment: Augment | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start_batch: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalised float32 images N x C x H x W and int64 labels N.

        Args:
            batch_size: of all ranks together; `plan_batches` says who gets which part.
            normalisation: applied last, to pixels in 0..1.
            augment: None for evaluation. Crops and flips depend on (seed, epoch, sample index) only.
            shuffle: in an order that depends on (seed, epoch).
            start_batch: the first batch to read; the ones before it cost nothing (resuming).
            rank, num_ranks: this process and how many there are.
            drop_last: leave out a last batch that is not full.

        Raises:
            ValueError: as `plan_batches`; at the call, not at the first batch.
        """
        plan = plan_batches(
            self.num_samples,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            start_batch=start_batch,
            rank=rank,
            num_ranks=num_ranks,
            drop_last=drop_last,
        )
        return self.read(plan, normalisation, augment or NONE, seed, epoch)

    @abstractmethod
    def subset(self, indices: Tensor) -> "Split":
        """The samples at these int64 indices, in this order."""

    @abstractmethod
    def digest(self) -> str:
        """A number that tells this split from any other: of the pixels, or of the files that hold them."""

    @abstractmethod
    def read(
        self, plan: Sequence[Tensor], normalisation: Normalisation, augment: Augment, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a plan, see `plan_batches`; checks its arguments before it returns the iterator."""


@dataclass(frozen=True, eq=False)
class TensorSplit(Split):
    """Images that live in memory.

    Args:
        images: uint8, or float32 in 0..1, N x C x H x W.
        labels: int64, N.
        image_size: resize batches to this many pixels a side (bilinear, after crop and flip); None keeps them.

    Raises:
        ValueError: images that are not finite, not in 0..1 or not square; labels that are no whole numbers, or not as
            many as images.
    """

    images: Tensor
    labels: Tensor
    image_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", check_images(self.images, "a split"))
        object.__setattr__(self, "labels", check_labels(self.labels, None, "a split"))
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"a split must have a label for each image, got {len(self.images)} images and {len(self.labels)} labels"
            )

    def subset(self, indices: Tensor) -> "TensorSplit":
        return TensorSplit(self.images[indices], self.labels[indices], self.image_size)

    def digest(self) -> str:
        described = f"{self.images.dtype} {tuple(self.images.shape)} {self.image_size}"
        found = hashlib.sha256(described.encode())
        for tensor in (self.images, self.labels):
            found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()

    def read(
        self, plan: Sequence[Tensor], normalisation: Normalisation, augment: Augment, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if augment.min_area < 1:
            raise ValueError(
                f"min_area works on image folders only, got {augment.min_area}; use pad for images in memory"
            )
        return self._generate(plan, normalisation, augment, seed, epoch)

    def _generate(
        self, plan: Sequence[Tensor], normalisation: Normalisation, augment: Augment, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for indices_N in plan:
            images_NCHW = crop_and_flip(
                self.images.index_select(0, indices_N), indices_N, augment, seed=seed, epoch=epoch
            )
            yield normalisation.apply(resize(unit_range(images_NCHW), self.image_size)), self.labels[indices_N]


def unit_range(images_NCHW: Tensor) -> Tensor:
    """uint8 pixels as float32 in 0..1; floats as they are."""
    return images_NCHW.float().div_(255) if images_NCHW.dtype == torch.uint8 else images_NCHW


def resize(images_NCHW: Tensor, image_size: int | None) -> Tensor:
    """Float images at image_size x image_size pixels, bilinear with antialiasing; None keeps them."""
    if image_size is None or images_NCHW.shape[-2:] == (image_size, image_size):
        return images_NCHW
    if not len(images_NCHW):  # interpolate refuses empty batches
        return images_NCHW.new_empty(0, images_NCHW.shape[1], image_size, image_size)
    return F.interpolate(images_NCHW, (image_size, image_size), mode="bilinear", antialias=True, align_corners=False)
