"""From a trained student to a graph with markers, the common start of every engine.

Each quantizer becomes one node ``fewbits::Mark(x)`` that carries the quantizer's qualified name; everything around it
is standard ONNX. An engine's builder replaces the markers by what that engine makes fast.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..quantizers import Quantizer

DOMAIN = "fewbits"
MARK = "Mark"
OPSET = 21
"""The newest opset that ONNX Runtime 1.23 and later fuse completely; integer Clip needs 12, BitwiseAnd 18."""

INPUT, OUTPUT = "images", "logits"

# The last one writes down every step of a trace, wherever somebody listens to the root logger.
_NARRATORS = ("torch.onnx", "onnxscript", "torch.export", "onnx_ir", "torch.__trace")


class Normalisation(Protocol):
    """Per-channel mean and standard deviation of pixels in 0..1."""

    @property
    def mean(self) -> tuple[float, ...]:
        """One number a channel."""

    @property
    def std(self) -> tuple[float, ...]:
        """One positive number a channel."""


class _Marker(nn.Module):
    """Stands where a quantizer stood, and leaves its name in the graph."""

    def __init__(self, name: str, calls: Iterator[int]) -> None:
        super().__init__()
        self.name = name
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        # Numbered, or the exporter would merge two runs of one quantizer on the same value.
        attributes: dict[str, Any] = {"quantizer": self.name, "call": next(self.calls)}
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{MARK}", (x,), attributes, dtype=x.dtype, shape=x.shape)


def normalise(images: Tensor, normalisation: Normalisation | None) -> Tensor:
    """``(images - mean) / std``, the two operations that stand in the exported graph as well."""
    if normalisation is None:
        return images
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (normalisation.mean, normalisation.std))
    return (images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def trace(student: nn.Module, example: Tensor, normalisation: Normalisation | None) -> ir.Model:
    """The student's graph, with a marker for each time that a quantizer runs.

    Args:
        student: in eval mode, on the CPU. It is copied, not changed.
        example: images in 0..1, N x C x H x W; only its shape counts.
        normalisation: goes into the graph, in front of everything else.

    Returns:
        A model with the input ``images`` (float32, any N) and the output ``logits``.

    Raises:
        ValueError: ``torch.export`` cannot follow the network.
    """
    network = copy.deepcopy(student)
    markers: dict[int, _Marker] = {}
    calls = itertools.count()
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, Quantizer) and bool(module.enabled):
            parent, _, attribute = name.rpartition(".")
            # A quantizer that is shared under several names has one marker, with the first name.
            setattr(network.get_submodule(parent), attribute, markers.setdefault(id(module), _Marker(name, calls)))

    def prepend(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (normalise(args[0], normalisation), *args[1:])

    network.register_forward_pre_hook(prepend, prepend=True)
    # A batch of one would be taken for a constant.
    sample = example[:2] if len(example) > 1 else torch.cat([example, example])
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                network,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                verbose=False,
            )
        except Exception as error:  # whatever torch.export raises for a stranger's forward
            raise ValueError(
                f"student {type(student).__name__} cannot be exported: {type(error).__name__}: {str(error)[:500]}; its "
                "forward must take one batch of images of any size N and be free of data-dependent branches"
            ) from error
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates its steps and warns about its own deprecations."""
    loggers = [logging.getLogger(name) for name in _NARRATORS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
