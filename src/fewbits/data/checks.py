"""What must hold of any data set, said once."""

from pathlib import Path

import torch
from torch import Tensor


def check_labels(labels_N: Tensor, num_classes: int | None, where: str | Path) -> Tensor:
    """The labels as int64, shape (N,); any whole numbers where the number of classes is not known, None.

    Raises:
        ValueError: a label outside 0..num_classes - 1, with its file (`where`), index and value.

    >>> check_labels(torch.tensor([0, 3]), 3, "labels.npy")
    Traceback (most recent call last):
    ValueError: labels.npy: label 1 is 3; labels must be between 0 and 2 (3 classes)
    """
    if labels_N.ndim != 1 or labels_N.is_floating_point() or labels_N.is_complex():
        raise ValueError(
            f"{where}: labels must be integers of shape (N,), got {labels_N.dtype} of shape {tuple(labels_N.shape)}"
        )
    labels_N = labels_N.long()
    if num_classes is None:
        return labels_N
    wrong = ((labels_N < 0) | (labels_N >= num_classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"{where}: label {index} is {int(labels_N[index])}; "
            f"labels must be between 0 and {num_classes - 1} ({num_classes} classes)"
        )
    return labels_N


def check_images(images_NCHW: Tensor, where: str) -> Tensor:
    """The images as uint8, or float32 in 0..1.

    Raises:
        ValueError: another type or shape; pixels that are not finite or outside 0..1, with the first such image.
    """
    if images_NCHW.ndim != 4 or images_NCHW.shape[2] != images_NCHW.shape[3]:
        last = images_NCHW.ndim == 4 and images_NCHW.shape[3] in (1, 3)
        hint = "; bring the channels forward, axes 0, 3, 1, 2" if last else ""
        raise ValueError(f"{where}: images must be square, N x C x H x W, got shape {tuple(images_NCHW.shape)}{hint}")
    if images_NCHW.dtype == torch.uint8:
        return images_NCHW
    if not images_NCHW.is_floating_point():
        raise ValueError(f"{where}: images must be uint8, or floats in 0..1, got {images_NCHW.dtype}")
    images_NCHW = images_NCHW.float()
    finite_N = images_NCHW.isfinite().flatten(1).all(1)
    if not finite_N.all():
        raise ValueError(
            f"{where}: image {int((~finite_N).nonzero()[0])} holds NaN or infinity; leave it out or repair it"
        )
    inside_N = ((images_NCHW >= 0) & (images_NCHW <= 1)).flatten(1).all(1)
    if not inside_N.all():
        index = int((~inside_N).nonzero()[0])
        low, high = images_NCHW[index].aminmax()
        raise ValueError(
            f"{where}: image {index} has pixels from {low:g} to {high:g}; float images must be in 0..1, not yet "
            "normalised (give the `normalisation` instead: it travels with the model)"
        )
    return images_NCHW


def check_count(what: str, got: int, expected: int, where: str | Path) -> None:
    """Raises ValueError when `got` samples are not the `expected` ones."""
    if got != expected:
        raise ValueError(
            f"{where}: {what} must be {expected:,}, got {got:,}; the copy is incomplete or another set: fetch it again"
        )
