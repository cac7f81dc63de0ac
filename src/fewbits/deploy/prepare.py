"""What every way into an engine begins with: is this a student that can be shipped, and the graph traced from it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..convert import check_calibrated
from .sessions import missing

if TYPE_CHECKING:
    import onnx_ir as ir

    from .graph import Normalisation


def prepare(
    student: nn.Module, example: Tensor, normalisation: Normalisation | Literal["trained"] | None
) -> tuple[nn.Module, ir.Model, Tensor, Normalisation | None]:
    """A copy of ``student`` that is ready, its traced graph, the images and the normalisation; see ``export``."""
    if normalisation == "trained":
        normalisation = trained_with(student)
    images = _check_images(example, normalisation)
    _check_numbers(student)
    check_calibrated(student)
    try:
        from . import graph, onnx  # noqa: F401
    except ImportError as error:
        raise missing(error) from error

    network = copy.deepcopy(student).cpu().float().eval()
    with torch.no_grad():
        _check_forward(network, graph.normalise(images[:1], normalisation), images)
    return network, graph.trace(network, images, normalisation), images, normalisation


def trained_with(student: nn.Module) -> Normalisation | None:
    """The normalisation that ``fit`` left with the student; a network from another loop has none and has to say."""
    if "fewbits_normalisation" not in student.__dict__:
        raise ValueError(
            "normalisation is not known, for student was not trained by fit; pass the mean and std of its pixels, or "
            "None if it takes pixels in 0..1 as they are"
        )
    known: Normalisation | None = student.__dict__["fewbits_normalisation"]
    return known


def _check_images(example: Tensor, normalisation: Normalisation | None) -> Tensor:
    if example.ndim != 4 or len(example) == 0:
        raise ValueError(f"example must be a batch of images, N x C x H x W, got {tuple(example.shape)}")
    images = example.detach().cpu()
    if images.dtype == torch.uint8 or not images.is_floating_point():
        raise ValueError(f"example must be float images in 0..1, got {images.dtype}; divide by 255")
    images = images.float().contiguous()
    # Comparisons with NaN are false, so that it is refused here as well.
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"example must be images in 0..1, got values from {float(images.min()):.4g} to {float(images.max()):.4g}; "
            "pass them as they are before normalisation, and the normalisation beside them"
        )
    if normalisation is not None and len(normalisation.mean) != images.shape[1]:
        raise ValueError(
            f"normalisation must have one mean and std for each of the {images.shape[1]} channels of example, got "
            f"{len(normalisation.mean)}"
        )
    return images


def _check_numbers(student: nn.Module) -> None:
    bad = [n for n, t in student.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ValueError(f"student holds NaN or infinite numbers in {', '.join(bad[:5])}; it cannot be exported")


def _check_forward(network: nn.Module, normalised: Tensor, images: Tensor) -> None:
    try:
        network(normalised)
    except Exception as error:  # whatever a layer says about a shape that it does not take
        raise ValueError(
            f"example has shape {tuple(images.shape)}, which student does not take: {type(error).__name__}: {error}"
        ) from error
