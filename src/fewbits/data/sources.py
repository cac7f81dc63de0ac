"""Where each named set lies below a data folder, how it is read, and how one comes by it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fewbits.data import cifar, digits, fashion_mnist, flowers17
from fewbits.data.augment import Augment
from fewbits.data.checks import check_count, check_labels
from fewbits.data.dataset import Dataset
from fewbits.data.normalisation import Normalisation
from fewbits.data.split import TensorSplit


@dataclass(frozen=True)
class Source:
    """How one named set is found, read and come by.

    Args:
        find: the folder that holds it below a data root, or None.
        read: that folder's contents.
        num_train, num_test: images.
        get: what a person has to do to have it.
        download: torchvision's name for it.
    """

    find: Callable[[Path], Path | None]
    read: Callable[[Path], Dataset]
    num_train: int
    num_test: int
    get: str
    download: str | None = None


def _find_cifar(forms: tuple[cifar.Form, ...]) -> Callable[[Path], Path | None]:
    """The first form that is below the root, or below a folder of the set's name in it."""

    def find_folder(root: Path) -> Path | None:
        candidates = [(parent / form.folder, form) for parent in (root, root / forms[0].folder) for form in forms]
        return next((folder for folder, form in candidates if (folder / form.marker).is_file()), None)

    return find_folder


def _read_cifar(
    name: str, forms: tuple[cifar.Form, ...], num_classes: int, normalisation: Normalisation
) -> Callable[[Path], Dataset]:
    def read(folder: Path) -> Dataset:
        form = next(form for form in forms if form.folder == folder.name)
        classes = cifar.read_names(form, folder)
        check_count("classes", len(classes), num_classes, folder)
        splits = [
            _in_memory(*form.read(form, folder, split), num_classes, count, f"{folder} ({split})")
            for split, count in (("train", 50_000), ("test", 10_000))
        ]
        return Dataset(name, splits[0], splits[1], classes, 3, 32, normalisation, Augment(pad=4, flip=True))

    return read


def _find_fashion_mnist(root: Path) -> Path | None:
    folders = [root / folder for folder in fashion_mnist.FOLDERS]
    return next((folder for folder in folders if fashion_mnist.find_idx(folder, "train", "images")), None)


def _read_fashion_mnist(folder: Path) -> Dataset:
    splits = [
        _in_memory(*fashion_mnist.read_split(folder, split), 10, count, f"{folder} ({split})")
        for split, count in (("train", 60_000), ("test", 10_000))
    ]
    normalisation = Normalisation((0.2860,), (0.3530,))
    return Dataset(
        "fashion-mnist", splits[0], splits[1], fashion_mnist.CLASSES, 1, 28, normalisation, Augment(pad=2, flip=True)
    )


def _in_memory(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], num_classes: int, expected: int, where: str
) -> TensorSplit:
    check_count("images", len(images), expected, where)
    check_count("labels", len(labels), expected, where)
    return TensorSplit(
        torch.from_numpy(images), check_labels(torch.from_numpy(labels.astype(np.int64)), num_classes, where)
    )


def _find_flowers17(root: Path) -> Path | None:
    return root / "flowers17" if (root / "flowers17" / "split.csv").is_file() else None


_GET_CIFAR = (
    "Unpack {} (https://www.cs.toronto.edu/~kriz/cifar.html) so that {} lies in such a folder, set FEWBITS_DATA to the "
    "folder, or allow the download"
)

SOURCES: dict[str, Source] = {
    "digits": Source(
        lambda root: root,
        lambda folder: digits.load_digits(),
        digits.NUM_TRAIN,
        digits.NUM_TEST,
        "pip install scikit-learn",
    ),
    "cifar10": Source(
        _find_cifar(cifar.CIFAR10_FORMS),
        _read_cifar(
            "cifar10", cifar.CIFAR10_FORMS, 10, Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        ),
        50_000,
        10_000,
        _GET_CIFAR.format("cifar-10-python.tar.gz", "cifar-10-batches-py"),
        "CIFAR10",
    ),
    "cifar100": Source(
        _find_cifar(cifar.CIFAR100_FORMS),
        _read_cifar(
            "cifar100", cifar.CIFAR100_FORMS, 100, Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
        ),
        50_000,
        10_000,
        _GET_CIFAR.format("cifar-100-python.tar.gz", "cifar-100-python"),
        "CIFAR100",
    ),
    "fashion-mnist": Source(
        _find_fashion_mnist,
        _read_fashion_mnist,
        60_000,
        10_000,
        "Put the four files of https://github.com/zalandoresearch/fashion-mnist into FashionMNIST/raw in such a "
        "folder, set FEWBITS_DATA to the folder, or allow the download",
        "FashionMNIST",
    ),
    "flowers17": Source(
        _find_flowers17,
        flowers17.load_flowers17,
        flowers17.NUM_TRAIN,
        flowers17.NUM_TEST,
        "Put flowers17/split.csv (file, label, class, split) and the pictures that it lists into such a folder, or "
        "give your copy as folder:PATH",
    ),
}
