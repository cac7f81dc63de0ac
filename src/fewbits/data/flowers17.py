"""Oxford 17 Flowers, for learning from few images.

M.-E. Nilsback, A. Zisserman, "A Visual Vocabulary for Flower Classification", CVPR 2006.
"""

import csv
from pathlib import Path

import numpy as np
import torch

from fewbits.data.augment import Augment
from fewbits.data.checks import check_count, check_labels
from fewbits.data.dataset import Dataset
from fewbits.data.folder_split import centre_crop, read_picture
from fewbits.data.normalisation import IMAGENET
from fewbits.data.split import TensorSplit

SIZE = 128  # pixels: the shorter side of the stored pictures
NUM_TRAIN, NUM_TEST = 680, 340


def load_flowers17(folder: Path) -> Dataset:
    """Centre crops of 128 x 128 pixels in memory, with the train and the test part of `split.csv`.

    The val part (340 images) is not used: hold a part of train out, as with the other sets, or read it with
    `read_part(folder, "val", ...)`.

    Raises:
        ValueError: a split.csv without these columns, a picture that cannot be decoded, or other counts.
    """
    names: dict[int, str] = {}
    train = read_part(folder, "train", names)
    test = read_part(folder, "test", names)
    check_count("training images", train.num_samples, NUM_TRAIN, folder)
    check_count("test images", test.num_samples, NUM_TEST, folder)
    return Dataset(
        name="flowers17",
        train=train,
        test=test,
        classes=tuple(names[label] for label in sorted(names)),
        channels=3,
        image_size=SIZE,
        normalisation=IMAGENET,
        augment=Augment(pad=SIZE // 8, flip=True),  # an eighth of the side, as for CIFAR
    )


def read_part(folder: Path, part: str, names: dict[int, str] | None = None) -> TensorSplit:
    """One part of split.csv; `names` receives the class names by label."""
    table = folder / "split.csv"
    try:
        with table.open(newline="") as file:
            rows = [
                (row["file"], int(row["label"]), row["class"]) for row in csv.DictReader(file) if row["split"] == part
            ]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{table} must have the columns file, label, class and split ({error})") from error
    if names is not None:
        names.update({label: name for _, label, name in rows})
    images = (
        np.stack([read_picture(folder / name, centre_crop(SIZE)) for name, _, _ in rows])
        if rows
        else np.empty((0, 3, SIZE, SIZE), np.uint8)
    )
    labels = check_labels(torch.tensor([label for _, label, _ in rows], dtype=torch.int64), 17, table)
    return TensorSplit(torch.from_numpy(images), labels)
