"""The batches that one process sees: training, calibration, test. Each is a function of the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import Dataset, Normalisation
from ..data.augment import NONE
from ..data.split import plan_batches
from .settings import Settings
from .setup import steps_per_epoch

EVALUATION_BATCH = 500
CALIBRATION_BATCHES = 2


class Batch(NamedTuple):
    """What a step is made of.

    Args:
        images: N x C x H x W, normalised.
        labels: int64, N.
        views: int64, N: which picture each one is. The same number is the same picture, whenever it comes.
    """

    images: Tensor
    labels: Tensor
    views: Tensor


class Feed:
    """Batches of this process, on its device and in its memory format.

    Args:
        data: train and test split.
        normalisation: of the pixels.
        settings: batch size, seed.
        accelerator: which share of each batch is this process's.
        memory_format: of the images.
    """

    def __init__(
        self,
        data: Dataset,
        normalisation: Normalisation,
        settings: Settings,
        accelerator: Accelerator,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.data, self.normalisation, self.settings = data, normalisation, settings
        self.device, self.memory_format = accelerator.device, memory_format
        self.rank, self.num_ranks = accelerator.process_index, accelerator.num_processes

    @property
    def moves(self) -> bool:
        """Whether a sample looks different in each epoch."""
        return self.data.augment != NONE

    @property
    def num_views(self) -> int:
        """Different pictures in the whole run."""
        return (math.ceil(self.settings.epochs) if self.moves else 1) * self.data.train.num_samples

    def training(self, step: int) -> Iterator[Batch]:
        """This process's share of the training batches from ``step`` on, without end."""
        data, seed = self.data, self.settings.seed
        num_steps = steps_per_epoch(data, self.settings)
        while True:
            epoch, start = divmod(step, num_steps)
            plan = plan_batches(
                data.train.num_samples,
                batch_size=self.settings.batch_size,
                shuffle=True,
                seed=seed,
                epoch=epoch,
                start_batch=start,
                rank=self.rank,
                num_ranks=self.num_ranks,
                drop_last=True,
            )
            first = epoch * data.train.num_samples if self.moves else 0
            batches = data.train.read(plan, self.normalisation, data.augment, seed, epoch)
            for indices, (images, labels) in zip(plan, batches, strict=True):
                step += 1
                yield Batch(self._placed(images), labels.to(self.device), first + indices)

    def plain(self, num: int) -> Iterator[Tensor]:
        """Training images, the same in every process, from beyond the epochs that are trained on."""
        batches = self.data.train.batches(
            batch_size=min(self.settings.batch_size, self.data.train.num_samples),
            normalisation=self.normalisation,
            augment=self.data.augment,
            shuffle=True,
            seed=self.settings.seed,
            epoch=math.ceil(self.settings.epochs),
            drop_last=True,
        )
        for _, (images, _labels) in zip(range(num), batches, strict=False):
            yield self._placed(images)

    def calibration(self) -> Iterator[Tensor]:
        """The few batches that ranges start from."""
        return self.plain(CALIBRATION_BATCHES)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test split."""
        return self.data.test.batches(
            batch_size=EVALUATION_BATCH,
            normalisation=self.normalisation,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
