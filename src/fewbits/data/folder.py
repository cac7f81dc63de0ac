"""Image folders: one folder a class, with or without a division into train and test."""

import logging
from pathlib import Path

import torch

from fewbits.data.augment import Augment
from fewbits.data.dataset import Dataset, pick
from fewbits.data.folder_split import FolderSplit
from fewbits.data.normalisation import IMAGENET

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
DEFAULT_SIZE = 224
AUGMENT = Augment(flip=True, min_area=0.25)  # ImageNet's 0.08 asks for long schedules


def load_folder(path: Path, image_size: int | None = None) -> Dataset:
    """Reads `path/train/CLASS/*` with `path/test/CLASS/*` (or `val`), or `path/CLASS/*`, which is split 80 to 20.

    Pictures may have any size; see `folder_split` for how they are cut. They are normalised as ImageNet's are.

    Args:
        path: the folder. `train`, `test`, `val` and the files' endings may be written in capitals.
        image_size: pixels a side, 224 unless given.

    Raises:
        ValueError: no such folder; no class folder, one class only, or one without an image; train without test or the
            other way round; classes that differ between them.
    """
    size = DEFAULT_SIZE if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {size}")
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder (looked for {path.absolute()}); give an image folder with one folder a class"
        )
    train_path, test_path = _part(path, "train"), _part(path, "test") or _part(path, "val")
    if train_path and test_path:
        train, test = _scan(train_path), _scan(test_path)
        _check_same_classes(train, test, train_path, test_path)
        classes, splits = tuple(train), (_split(train, size), _split(test, size))
    elif train_path or test_path:
        there, lacking = (train_path, "test (or val)") if train_path else (test_path, "train")
        raise ValueError(
            f"{path} has {there.name if there else ''} but no {lacking}; add it, "
            f"or give folder:{there} to have it split 80 to 20"
        )
    else:
        classes, splits = _split_80_20(path, size)
    return Dataset(
        f"folder:{path}", *splits, classes, channels=3, image_size=size, normalisation=IMAGENET, augment=AUGMENT
    )


def _part(path: Path, name: str) -> Path | None:
    """The subfolder of this name in any mixture of capitals."""
    found = sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name.lower() == name)
    if len(found) > 1:
        raise ValueError(f"{path} has {' and '.join(entry.name for entry in found)}; keep one of them")
    return found[0] if found else None


def _scan(path: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, sorted, so that labels do not depend on the file system."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{path} is empty: it must hold one folder a class with images in it")
    classes, others = {}, 0
    for folder in folders:
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        others += len(files) - len(images)
        if not images:
            raise ValueError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); fill it or take it away")
        classes[folder.name] = images
    if len(classes) < 2:
        raise ValueError(f"{path} has the one class {folders[0].name!r}; a classifier needs at least two")
    if others:
        logger.warning("%s: %d files that are not images are left out", path, others)
    return classes


def _check_same_classes(
    train: dict[str, list[Path]], test: dict[str, list[Path]], train_path: Path, test_path: Path
) -> None:
    if train.keys() == test.keys():
        return
    only_train, only_test = sorted(train.keys() - test.keys()), sorted(test.keys() - train.keys())
    hint = "make them the same"
    if {name.lower() for name in only_train} == {name.lower() for name in only_test}:
        hint = "they differ in capitals only: rename them alike"
    raise ValueError(
        f"{train_path} and {test_path} must have the same classes; "
        f"only in the first: {only_train}, only in the second: {only_test}; {hint}"
    )


def _split(classes: dict[str, list[Path]], size: int) -> FolderSplit:
    labels = [torch.full((len(files),), label) for label, files in enumerate(classes.values())]
    return FolderSplit(tuple(file for files in classes.values() for file in files), torch.cat(labels), size)


def _split_80_20(path: Path, size: int) -> tuple[tuple[str, ...], tuple[FolderSplit, FolderSplit]]:
    """The same fifth of each class every time, one image of it at least."""
    classes = _scan(path)
    whole = _split(classes, size)
    held = pick(whole.labels, [max(1, round(len(files) / 5)) for files in classes.values()], seed=0, leave=1)
    kept = torch.ones(whole.num_samples, dtype=torch.bool)
    kept[held] = False
    train, test = whole.subset(kept.nonzero().squeeze(1)), whole.subset(held)
    logger.warning(
        "%s has no train and test folders: %d of its images are held out for testing, always the same ones",
        path,
        test.num_samples,
    )
    return tuple(classes), (train, test)
