"""What an export reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class ParityError(RuntimeError):
    """What the engine computes is not what was trained; the message names the worst layer."""


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer in the engine.

    Args:
        name: qualified name.
        weight_bits, activation_bits: 1 to 8, 32 for full precision.
        kernel: the operator that the engine runs, read from its own optimized graph.
        reason: why that is no integer kernel; empty if it is one.
        note: why it is not the kernel that one would expect, a binary one for example.
        choice: why it was chosen where there are several: the time of each, or that none was measured.
    """

    name: str
    weight_bits: int
    activation_bits: int
    kernel: str
    reason: str = ""
    note: str = ""
    choice: str = ""


@dataclass(frozen=True)
class CodeRow:
    """One activation quantizer in the engine, fed PyTorch's own codes in front of it.

    Args:
        name: qualified name; ``#2`` and so on where it runs several times.
        bits: of its codes; 32 for the logits.
        equal: share of codes that are equal, 0 to 1.
        largest: largest difference, in steps of the grid (for the logits: in logits).
    """

    name: str
    bits: int
    equal: float
    largest: float


@dataclass(frozen=True)
class Misplaced:
    """A node of a QDQ graph that TensorRT would not run in int8.

    Args:
        name: of the layer, or ``behind`` the layer in front of it.
        operator: of ONNX.
        reason: the rule that it breaks.
    """

    name: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what was found out about it.

    Args:
        path: of the file.
        size_bytes: of the file.
        theoretical_bytes: every weight at its bits, every other parameter at 32.
        float_bytes: every parameter at 32 bits.
        max_difference: largest difference of a logit between PyTorch and the engine; NaN if it was not checked.
        mean_difference: mean difference of a logit, likewise.
        own_difference: the same between two orders of summation in PyTorch itself: what float noise alone does.
        equal_predictions: share of images with the same prediction, 0 to 1; NaN if it was not checked.
        layers: kernel of each quantized layer.
        codes: parity of each activation quantizer, then of the logits; empty if it was not checked.
        dynamic: quantizers whose range is found anew in every batch: with them an image's logits depend on the images
            beside it, in the engine as in PyTorch.
        variant: form of the file, see ``export``.
        misplaced: where a QDQ graph is not as TensorRT takes it; of other variants nothing is said.
    """

    path: Path
    size_bytes: int
    theoretical_bytes: int
    float_bytes: int
    max_difference: float
    mean_difference: float
    own_difference: float
    equal_predictions: float
    layers: tuple[LayerRow, ...]
    codes: tuple[CodeRow, ...]
    dynamic: tuple[str, ...] = ()
    variant: str = "packed"
    misplaced: tuple[Misplaced, ...] = ()
