"""CIFAR-10 and CIFAR-100 in the forms that they are found in.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbits.data.places import cached_array

Bytes = NDArray[np.uint8]
Arrays = tuple[Bytes, Bytes]

_PIXELS = 3 * 32 * 32
_SHEET = 320  # pixels a side: 10 rows of 10 images


@dataclass(frozen=True)
class Form:
    """One way in which a set lies on disk.

    Args:
        folder: below a data root, or below a folder of the set's name in it.
        marker: a file that shows that this form is there.
        train, test: the files of the splits, or globs.
        names, names_key: the file with the class names, and in pickles its entry.
        label_key: in pickles, the entry with the labels.
        label_bytes: in binary records, the label bytes before the pixels.
    """

    folder: str
    marker: str
    read: Callable[["Form", Path, str], Arrays]
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_key: str = ""
    names_key: str = ""
    label_bytes: int = 1


def read_sheets(form: Form, folder: Path, split: str) -> Arrays:
    """Lossless WebP sheets of 10 x 10 images, and `<split>_labels.npy`."""
    files = sorted((folder / split).glob("*.webp"))
    images = cached_array(f"{form.folder}-{split}", files, lambda: _decode_sheets(files))
    path = folder / f"{split}_labels.npy"
    try:
        labels: Bytes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy file ({error}); fetch it again") from error
    return images, labels


def _decode_sheets(files: list[Path]) -> Bytes:
    images = np.empty((len(files) * 100, 3, 32, 32), np.uint8)
    for number, file in enumerate(files):
        try:
            with Image.open(file) as image:
                sheet = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} cannot be decoded ({error}); fetch it again") from error
        if sheet.shape != (_SHEET, _SHEET, 3):
            raise ValueError(f"{file} must be {_SHEET} x {_SHEET} pixels, got {sheet.shape[1]} x {sheet.shape[0]}")
        images[number * 100 : (number + 1) * 100] = (
            sheet.reshape(10, 32, 10, 32, 3).transpose(0, 2, 4, 1, 3).reshape(100, 3, 32, 32)
        )
    return images


def read_binary(form: Form, folder: Path, split: str) -> Arrays:
    """Records of one label byte or two (the last one counts) and 3,072 pixels."""
    records = []
    for file in _files(form, folder, split):
        data = np.fromfile(file, np.uint8)
        if data.size % (form.label_bytes + _PIXELS) or not data.size:
            raise ValueError(
                f"{file} must hold records of {form.label_bytes + _PIXELS} bytes, got {data.size} bytes; fetch it again"
            )
        records.append(data.reshape(-1, form.label_bytes + _PIXELS))
    stacked = np.concatenate(records)
    return stacked[:, form.label_bytes :].reshape(-1, 3, 32, 32), stacked[:, form.label_bytes - 1]


def read_pickles(form: Form, folder: Path, split: str) -> Arrays:
    """The original Python batches, opened without running what a pickle may ask for."""
    images, labels = [], []
    for file in _files(form, folder, split):
        batch = load_plain_pickle(file)
        pixels, entries = _entry(batch, "data", file), _entry(batch, form.label_key, file)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.ndim != 2
            or pixels.shape[1] != _PIXELS
        ):
            raise ValueError(f"{file}: 'data' must be uint8 of N x {_PIXELS}")
        if not isinstance(entries, list) or not all(isinstance(entry, int) for entry in entries):
            raise ValueError(f"{file}: '{form.label_key}' must be a list of integers")
        outside = [index for index, entry in enumerate(entries) if not 0 <= entry <= 255]
        if outside:
            raise ValueError(
                f"{file}: label {outside[0]} is {entries[outside[0]]}; labels must be between 0 and the largest class"
            )
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(np.array(entries, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def read_names(form: Form, folder: Path) -> tuple[str, ...]:
    """The class names in label order."""
    path = folder / form.names
    if not path.is_file():
        raise ValueError(f"{path} is missing: it names the classes; fetch the set again")
    if form.names_key:
        names = _entry(load_plain_pickle(path), form.names_key, path)
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return tuple(path.read_text().split())


def _files(form: Form, folder: Path, split: str) -> list[Path]:
    files = [folder / name for name in (form.train if split == "train" else form.test)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing; fetch the set again")
    return files


def _entry(batch: Any, key: str, file: Path) -> Any:
    if isinstance(batch, dict):
        for name in (key, key.encode()):
            if name in batch:
                return batch[name]
    raise ValueError(f"{file} has no entry '{key}'; it is not a CIFAR batch")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes into old pickle protocols as a call of `_codecs.encode`; no other codec is let in."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Knows arrays, and the numbers, texts, lists and dicts that pickles hold without asking."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.ndarray.__new__
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        _refuse(module, name)


def _refuse(module: str, name: str) -> NoReturn:
    raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data file has no use for")


def load_plain_pickle(path: Path) -> Any:
    """Reads a pickle of arrays, dicts, lists, texts and numbers.

    Raises:
        ValueError: a truncated file, or one that asks for anything else (it may be malicious).
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            # NumPy warns about how its own older versions wrote a dtype's flags, as in the published files.
            warnings.simplefilter("ignore")
            return _PlainUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a hostile or cut pickle can raise anything
        raise ValueError(
            f"{path} is not a readable CIFAR file ({type(error).__name__}: {error}); fetch it again"
        ) from error


CIFAR10_FORMS = (
    Form("cifar10", "train_labels.npy", read_sheets, (), (), "classes.txt"),
    Form(
        "cifar-10-batches-py",
        "data_batch_1",
        read_pickles,
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        label_key="labels",
        names_key="label_names",
    ),
    Form(
        "cifar-10-batches-bin",
        "data_batch_1.bin",
        read_binary,
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
    ),
)
CIFAR100_FORMS = (
    Form("cifar100", "train_labels.npy", read_sheets, (), (), "classes.txt"),
    Form(
        "cifar-100-python",
        "train",
        read_pickles,
        ("train",),
        ("test",),
        "meta",
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
    Form(
        "cifar-100-binary",
        "train.bin",
        read_binary,
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        label_bytes=2,
    ),
)
