"""The batches that one process sees: training, calibration, test. Each is a function of the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import Dataset, Normalisation
from .settings import Settings
from .setup import steps_per_epoch

EVALUATION_BATCH = 500
CALIBRATION_BATCHES = 2


class Feed:
    """Batches of this process, on its device and in its memory format.

    Args:
        data: train and test split.
        normalisation: of the pixels.
        settings: batch size, seed, memory format.
        accelerator: which share of each batch is this process's.
    """

    def __init__(
        self, data: Dataset, normalisation: Normalisation, settings: Settings, accelerator: Accelerator
    ) -> None:
        self.data, self.normalisation, self.settings = data, normalisation, settings
        self.device = accelerator.device
        self.rank, self.num_ranks = accelerator.process_index, accelerator.num_processes

    def training(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the training batches from ``step`` on, without end."""
        num_steps = steps_per_epoch(self.data, self.settings)
        while True:
            epoch, start = divmod(step, num_steps)
            for images, labels in self.data.train.batches(
                batch_size=self.settings.batch_size,
                normalisation=self.normalisation,
                augment=self.data.augment,
                shuffle=True,
                seed=self.settings.seed,
                epoch=epoch,
                start_batch=start,
                rank=self.rank,
                num_ranks=self.num_ranks,
                drop_last=True,
            ):
                step += 1
                yield self._placed(images), labels.to(self.device)

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
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True).contiguous(memory_format=layout)
