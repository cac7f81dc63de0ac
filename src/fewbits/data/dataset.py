"""A named data set: its two splits, its classes and how its images are normalised and augmented."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewbits.data.augment import NONE, Augment
from fewbits.data.checks import check_images, check_labels
from fewbits.data.draws import sample_keys
from fewbits.data.normalisation import Normalisation
from fewbits.data.split import Split, TensorSplit


@dataclass(frozen=True)
class Dataset:
    """Two splits of square images with class labels.

    Args:
        name: as `load` was given it.
        train, test: the splits; nothing may be tuned on `test`, see `hold_out`.
        classes: name of label 0, 1, ...
        channels: 1 or 3.
        image_size: height and width in pixels.
        normalisation: of pixels in 0..1.
        augment: what the training images usually get.

    Raises:
        TypeError: a split that is none.
        ValueError: labels out of range; images in memory of another shape than `channels` and `image_size` say.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    channels: int
    image_size: int
    normalisation: Normalisation
    augment: Augment = NONE

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            if not isinstance(split, Split):
                raise TypeError(
                    f"{self.name} {part} must be a Split, got {type(split).__name__}; see Dataset.from_tensors"
                )
            check_labels(split.labels, self.num_classes, f"{self.name} {part}")
            if isinstance(split, TensorSplit):
                channels, size = split.images.shape[1], split.image_size or split.images.shape[2]
                if (channels, size) != (self.channels, self.image_size):
                    raise ValueError(
                        f"{self.name} {part}: images must be {self.channels} x {self.image_size} x {self.image_size}, "
                        f"got {channels} x {size} x {size}"
                    )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @classmethod
    def from_tensors(
        cls,
        name: str,
        *,
        train: tuple[ArrayLike, ArrayLike],
        test: tuple[ArrayLike, ArrayLike],
        classes: Sequence[str] | None = None,
        normalisation: Normalisation | None = None,
        augment: Augment = NONE,
    ) -> Self:
        """A data set from images in memory.

        Args:
            train, test: images N x C x H x W, uint8 or float in 0..1, and integer labels N; tensors, or NumPy arrays,
                which are copied.
            classes: names; None numbers them up to the largest training label.
            normalisation: None measures the training images.

        Raises:
            TypeError: a split that is no pair, or holds what is no array of numbers.
            ValueError: images that are not finite, not in 0..1 or not square; labels out of range or of another number;
                splits of different shapes; fewer than two classes.

        >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> Dataset.from_tensors("mine", train=(images, labels), test=(images, labels)).num_classes
        2
        """
        pairs = {part: _tensors(split, f"{name} {part}") for part, split in (("train", train), ("test", test))}
        if classes is None:
            labels_N = pairs["train"][1]
            classes = [str(label) for label in range(int(labels_N.long().max()) + 1 if len(labels_N) else 0)]
        splits = [_tensor_split(pair, len(classes), f"{name} {part}") for part, pair in pairs.items()]
        shape, test_shape = (tuple(split.images.shape[1:]) for split in splits)
        if shape != test_shape:
            raise ValueError(f"{name}: train and test images must have one shape, got {shape} and {test_shape}")
        if len(splits[0].labels.unique()) < 2:
            raise ValueError(f"{name}: a classifier needs at least two classes in the training labels, got one")
        return cls(
            name=name,
            train=splits[0],
            test=splits[1],
            classes=tuple(classes),
            channels=shape[0],
            image_size=shape[1],
            normalisation=normalisation or Normalisation.measure(splits[0].images),
            augment=augment,
        )

    def pixels(self, num: int) -> Tensor:
        """The first `num` test images as pixels in 0..1, N x C x H x W: what an exported file takes."""
        plain = Normalisation.identity(self.channels)
        images_NCHW, _ = next(self.test.batches(batch_size=num, normalisation=plain))
        return images_NCHW

    def hold_out(self, num: int, seed: int = 0) -> "Dataset":
        """The same set with `num` training images held out as `test`; nothing then touches the real test images.

        Every class gives equally many; where num is not a multiple of the classes, the first ones give one more.

        Raises:
            ValueError: a class that would be left without a training image.
        """
        if not 1 <= num < self.train.num_samples:
            raise ValueError(f"num must be between 1 and {self.train.num_samples - 1}, got {num}")
        share, extra = divmod(num, self.num_classes)
        counts = [share + (label < extra) for label in range(self.num_classes)]
        held = pick(self.train.labels, counts, seed, leave=1)
        kept = torch.ones(self.train.num_samples, dtype=torch.bool)
        kept[held] = False
        return replace(self, train=self.train.subset(kept.nonzero().squeeze(1)), test=self.train.subset(held))

    def per_class(self, num: int, seed: int = 0) -> "Dataset":
        """The same set with only `num` training images of each class.

        Raises:
            ValueError: a class that has fewer.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1 image of each class, got {num}")
        return replace(self, train=self.train.subset(pick(self.train.labels, [num] * self.num_classes, seed)))


def pick(labels_N: Tensor, counts: Sequence[int], seed: int, leave: int = 0) -> Tensor:
    """Random indices, in rising order, of `counts[c]` samples of each class c.

    Drawn by hash rather than by a generator, so that a fixed split stays the same with every version of PyTorch.

    Raises:
        ValueError: a class with fewer than `counts[c] + leave` samples.
    """
    keys_N = sample_keys(seed, 0, torch.arange(len(labels_N)))
    picked = []
    for label, count in enumerate(counts):
        members = (labels_N == label).nonzero().squeeze(1)
        if len(members) < count + leave:
            raise ValueError(
                f"class {label} has {len(members)} training images, {count + leave} are needed; "
                "ask for fewer images or leave the class out"
            )
        picked.append(members[keys_N[members].argsort(stable=True)[:count]])
    return torch.cat(picked).sort().values


def _tensors(split: object, where: str) -> tuple[Tensor, Tensor]:
    if not isinstance(split, tuple | list) or len(split) != 2:
        raise TypeError(f"{where}: must be a pair of images and labels, got {type(split).__name__}")
    return _tensor(split[0], f"{where}: images"), _tensor(split[1], f"{where}: labels")


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values, order="C"))  # a copy: an array may be read-only, or change later
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be a tensor or a NumPy array, got {type(values).__name__} ({error})") from error


def _tensor_split(split: tuple[Tensor, Tensor], num_classes: int, where: str) -> TensorSplit:
    images_NCHW, labels_N = split
    images_NCHW, labels_N = check_images(images_NCHW, where), check_labels(labels_N, num_classes, where)
    if len(images_NCHW) != len(labels_N) or not len(labels_N):
        raise ValueError(
            f"{where}: images and labels must be equally many and at least one, "
            f"got {len(images_NCHW)} and {len(labels_N)}"
        )
    return TensorSplit(images_NCHW, labels_N)
