"""Fashion-MNIST from its idx files, plain or packed.

H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
2017.
"""

import gzip
import lzma
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewbits.data.places import cached_array

FOLDERS = ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_STEMS = {"train": "train", "test": "t10k"}
_SUFFIXES = ("", ".gz", ".xz")


def find_idx(folder: Path, split: str, kind: str) -> Path | None:
    """The idx file of a split's "images" or "labels", plain before packed, or None."""
    stem = f"{_STEMS[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).is_file()), None)


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images N x 1 x 28 x 28 and labels N.

    Raises:
        ValueError: a file that is missing, cut or of another kind.
    """
    images_file, labels_file = find_idx(folder, split, "images"), find_idx(folder, split, "labels")
    if images_file is None or labels_file is None:
        raise ValueError(
            f"{folder} lacks the {'labels' if images_file else 'images'} of the {split} split; fetch the set again"
        )
    images = cached_array(f"fashion-mnist-{split}", [images_file], lambda: read_idx(images_file, num_dims=3))
    return images[:, None], read_idx(labels_file, num_dims=1)


def _unpack(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return lzma.decompress(data) if path.suffix == ".xz" else data


def read_idx(path: Path, num_dims: int) -> NDArray[np.uint8]:
    """Reads an idx file of bytes: 0, 0, 8, number of axes; each axis's length, big-endian; then the data.

    Raises:
        ValueError: another header, or data of another length.
    """
    try:
        data = _unpack(path)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); fetch it again") from error
    header = 4 + 4 * num_dims
    if data[:4] != bytes((0, 0, 8, num_dims)) or len(data) < header:
        raise ValueError(f"{path} is not an idx file of bytes with {num_dims} axes; fetch it again")
    shape = tuple(int(length) for length in np.frombuffer(data, ">i4", num_dims, offset=4))
    if min(shape) < 0 or len(data) - header != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(
            f"{path} must hold {shape} values, got {len(data) - header}; it is cut or damaged: fetch it again"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(shape)
