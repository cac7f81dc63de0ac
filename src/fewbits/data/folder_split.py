"""Image files that worker processes decode while the network trains."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fewbits.data.augment import Augment, crop_and_flip
from fewbits.data.draws import draw_integers, draw_uniform, sample_keys
from fewbits.data.normalisation import Normalisation
from fewbits.data.split import Split, unit_range

View = Callable[[Image.Image], Image.Image]
"""From a whole RGB picture to the square part that the network sees."""

# Streams of one sample's key; crop_and_flip uses 0 to 2.
_AREA, _ASPECT, _LEFT, _TOP = 3, 4, 5, 6


def read_picture(path: Path, view: View) -> NDArray[np.uint8]:
    """Decodes an image file to uint8 RGB, 3 x H x W, after `view`.

    Raises:
        ValueError: a file that cannot be decoded, by name.
    """
    try:
        with Image.open(path) as image:
            # A palette with transparency goes through RGBA: converting it at once warns.
            rgb = (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
            return np.asarray(view(rgb)).transpose(2, 0, 1).copy()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); repair it or take it away") from error


def centre_crop(size: int) -> View:
    """The middle `size` x `size` pixels of a picture that is at least that large."""

    def view(image: Image.Image) -> Image.Image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    return view


def evaluation_view(size: int) -> View:
    """The shorter side resized to `size` * 256 / 224, then the middle `size` x `size`: ImageNet's usual evaluation."""

    def view(image: Image.Image) -> Image.Image:
        scale = round(size * 256 / 224) / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        return centre_crop(size)(image.resize((width, height), Image.Resampling.BILINEAR))

    return view


def random_view(size: int, min_area: float, key: int) -> View:
    """A random part of the picture, resized: an area share in [min_area, 1] and an aspect ratio in [3/4, 4/3].

    Differs from the usual RandomResizedCrop: a part that is larger than the picture is cut to it, where that draws
    again up to ten times; so every sample takes the same few draws from its key.
    """
    keys = torch.tensor([key])

    def view(image: Image.Image) -> Image.Image:
        area = image.width * image.height * (min_area + (1 - min_area) * float(draw_uniform(keys, _AREA)))
        aspect = math.exp(math.log(4 / 3) * (2 * float(draw_uniform(keys, _ASPECT)) - 1))
        width = min(image.width, max(1, round(math.sqrt(area * aspect))))
        height = min(image.height, max(1, round(math.sqrt(area / aspect))))
        left = int(draw_integers(keys, _LEFT, image.width - width + 1))
        top = int(draw_integers(keys, _TOP, image.height - height + 1))
        return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))

    return view


@dataclass(frozen=True)
class _Pictures(TorchDataset[NDArray[np.uint8] | str]):
    """What a worker process needs for one epoch; an error travels as its text, so it comes without a stack trace."""

    paths: Sequence[Path]
    image_size: int
    min_area: float
    seed: int
    epoch: int

    def __getitem__(self, index: int) -> NDArray[np.uint8] | str:
        if self.min_area < 1:
            key = int(sample_keys(self.seed, self.epoch, torch.tensor([index])))
            view = random_view(self.image_size, self.min_area, key)
        else:
            view = evaluation_view(self.image_size)
        try:
            return read_picture(self.paths[index], view)
        except ValueError as error:
            return str(error)


def _stack(pictures: list[NDArray[np.uint8] | str]) -> Tensor | str:
    arrays = []
    for picture in pictures:
        if isinstance(picture, str):
            return picture
        arrays.append(picture)
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class FolderSplit(Split):
    """Images that are decoded when they are needed.

    Args:
        paths: one file a sample.
        labels: int64, N.
        image_size: side of the square images, in pixels.
        num_workers: processes that decode; 0 decodes in this one. None takes one a core, eight at most.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    image_size: int
    num_workers: int | None = None

    def subset(self, indices: Tensor) -> "FolderSplit":
        return replace(self, paths=tuple(self.paths[index] for index in indices.tolist()), labels=self.labels[indices])

    def digest(self) -> str:
        """Of the files' paths, sizes and times of change, not of what is in them."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr((files, self.labels.tolist(), self.image_size)).encode()).hexdigest()

    def read(
        self, plan: Sequence[Tensor], normalisation: Normalisation, augment: Augment, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Pictures(self.paths, self.image_size, augment.min_area, seed, epoch),
            batch_sampler=[indices_N.tolist() for indices_N in plan],
            num_workers=_num_cores() if self.num_workers is None else self.num_workers,
            collate_fn=_stack,
            # Without a generator of its own it draws from the global one, which a resumed run would notice.
            generator=torch.Generator().manual_seed(0),
        )
        batch: Tensor | str
        for indices_N, batch in zip(plan, loader, strict=True):
            if isinstance(batch, str):
                raise ValueError(batch)
            images_NCHW = batch if len(batch) else batch.new_empty(0, 3, self.image_size, self.image_size)
            images_NCHW = crop_and_flip(images_NCHW, indices_N, augment, seed=seed, epoch=epoch)
            yield normalisation.apply(unit_range(images_NCHW)), self.labels[indices_N]


def _num_cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)
