"""The same images through PyTorch and through the engine, layer by layer.

The engine's graph is cut at every tensor of activation codes. Each piece is fed PyTorch's own codes, so that a
difference is counted in the layer that makes it and nowhere else. Engines round ties differently: at least 99.9 % of
the codes have to be equal, and none may be off by more than one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..quantizers import Codes, Quantizer
from ..quantizers.minmax import MinMax
from .activations import SIGNS, Cut
from .builder import Array
from .engines import ENGINES, Engine
from .graph import INPUT, OUTPUT, Normalisation, normalise
from .result import CodeRow, ParityError

MINIMUM_EQUAL_CODES = 0.999
LARGEST_STEP = 1.0
OWN_IMAGES = 64
"""Images on which PyTorch is compared with itself: without its fast kernels it is slow."""

OWN_FACTOR = 3.0
"""The engine may be so many times as far from PyTorch as PyTorch is from itself."""

TIE = 2e-6
"""What lies nearer to a rounding boundary than this share of its value may go either way: pixels are k / 255, and where
a step is a simple fraction of that, float noise decides. A sign is decided at zero, which no share moves.
"""

LOGIT_TOLERANCE = 1e-2
"""Largest difference of a logit that is fed PyTorch's own codes, as a share of the largest logit."""


@dataclass(frozen=True)
class Reference:
    """What PyTorch computes.

    Args:
        logits: N x classes.
        codes: by quantizer and run: the exported codes (uint8 or int8), or for dynamic grids the float values.
        steps: by quantizer and run: one step of the grid in units of ``codes``.
        bits: by quantizer.
        own_difference: mean difference of a logit between two orders of summation in PyTorch itself.
        ties: by quantizer and run: where a value lies on a rounding boundary.
    """

    logits: Array
    own_difference: float
    codes: dict[tuple[str, int], Array]
    steps: dict[tuple[str, int], float]
    bits: dict[str, int]
    ties: dict[tuple[str, int], Array]


@dataclass(frozen=True)
class Parity:
    """What was compared: see ``Exported``."""

    max_difference: float
    mean_difference: float
    own_difference: float
    equal_predictions: float
    codes: tuple[CodeRow, ...]


@torch.no_grad()
def reference(
    student: nn.Module, images: Tensor, normalisation: Normalisation | None, cuts: Sequence[Cut]
) -> Reference:
    """Run ``student`` on ``images`` (in 0..1) and keep the codes at every cut."""
    places = {(c.quantizer, c.call): c for c in cuts}
    codes: dict[tuple[str, int], Array] = {}
    steps: dict[tuple[str, int], float] = {}
    bits: dict[str, int] = {}
    ties: dict[tuple[str, int], Array] = {}
    calls: dict[str, int] = {}
    handles = []

    def record(name: str, module: Quantizer, args: tuple[Any, ...]) -> None:
        key = (name, calls.get(name, 0))
        calls[name] = key[1] + 1
        if key not in places:
            return
        found = module.encode(args[0])
        ties[key] = _ties(module, args[0].float(), found)
        zero_point = places[key].zero_point
        bits[name] = module.bits
        if zero_point is None:
            codes[key], steps[key] = found.decode().numpy(), float(found.scale)
        else:
            kind = torch.int8 if places[key].is_signed else torch.uint8
            codes[key], steps[key] = (found.integers + zero_point).to(kind).numpy(), 1.0
        if isinstance(module, SIGNS):
            # From -1 to +1 it is one step, and the codes of signs are 0 and 2.
            steps[key] *= 2

    for name, module in student.named_modules():
        if isinstance(module, Quantizer):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: record(name, m, args)))
    try:
        logits = student(normalise(images, normalisation))
    finally:
        for handle in handles:
            handle.remove()
    return Reference(
        logits.float().numpy(), _own_difference(student, images, normalisation, logits), codes, steps, bits, ties
    )


def _ties(quantizer: Quantizer, x: Tensor, found: Codes) -> Array:
    """Where ``x`` lies on a rounding boundary."""
    if isinstance(quantizer, MinMax):
        # Its range moves with its input: the boundaries are half-way between the levels of this batch.
        position = (x - found.offset) / found.scale
        return ((position - position.floor() - 0.5).abs() <= TIE * (position.abs() + 1)).numpy()
    above, below = (quantizer.encode(x * (1 + sign * TIE)).integers for sign in (1, -1))
    return (above != below).numpy()


def _own_difference(student: nn.Module, images: Tensor, normalisation: Normalisation | None, logits: Tensor) -> float:
    """How far PyTorch is from itself when sums are taken in another order.

    A low-bit network amplifies float noise: a value that falls to the other side of a rounding boundary moves others
    behind it. No engine can agree better with PyTorch than PyTorch does.
    """
    was_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # flags() would also set TF32, and warn
    try:
        again = student(normalise(images[:OWN_IMAGES], normalisation))
    finally:
        torch.backends.mkldnn.enabled = was_enabled
    return float((again - logits[:OWN_IMAGES]).abs().mean())


def compare(
    model: onnx.ModelProto, expected: Reference, images: Tensor, cuts: Sequence[Cut], engine: Engine | None = None
) -> Parity:
    """Run ``model`` whole and in pieces by ``engine`` (ONNX Runtime), and set both beside ``expected``."""
    engine = engine or ENGINES["onnxruntime"]
    inputs: dict[str, Array] = {INPUT: images.numpy()}
    whole = engine.open(model).run(inputs)[OUTPUT]
    feeds = {str(c.value.name): _shaped(expected, c) for c in cuts}
    pieces = engine.open(engine.cut(model, cuts, {name: codes.shape[1:] for name, codes in feeds.items()}))
    found = pieces.run(inputs | {f"{name}.in": codes for name, codes in feeds.items()})
    rows = []
    for cut in cuts:
        key = (cut.quantizer, cut.call)
        got, wanted = found[str(cut.value.name)], _shaped(expected, cut)
        difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64)).reshape(-1) / expected.steps[key]
        # A neighbour in place of a tie is as right as the code itself.
        tied = expected.ties[key].reshape(-1) & (difference < LARGEST_STEP + 0.5)
        difference = np.where(tied, 0.0, difference)
        # Dynamic grids are compared as values: what is nearer than half a step is the same code.
        equal, largest = float((difference < 0.5).mean()), float(difference.max())
        rows.append(CodeRow(row_name(cut), expected.bits[cut.quantizer], equal, largest))
    logits = np.abs(found[OUTPUT] - expected.logits)
    close = logits <= LOGIT_TOLERANCE * max(float(np.abs(expected.logits).max()), 1e-6)
    rows.append(CodeRow(OUTPUT, 32, float(close.mean()), float(logits.max())))
    predicted = (_predictions(whole) == _predictions(expected.logits)).mean()
    apart = np.abs(whole - expected.logits)
    return Parity(float(apart.max()), float(apart.mean()), expected.own_difference, float(predicted), tuple(rows))


def row_name(cut: Cut) -> str:
    """The name of a cut's row."""
    return cut.quantizer + (f"#{cut.call + 1}" if cut.call else "")


def wrong_rows(parity: Parity) -> list[CodeRow]:
    """Places that differ by more than rounding."""
    return [
        row
        for row in parity.codes
        if not row.equal >= (1.0 if row.bits == 32 else MINIMUM_EQUAL_CODES)
        or (row.bits < 32 and row.largest > LARGEST_STEP + 0.5)
    ]


def allowed_to_differ(minimum_equal: float, num_images: int) -> int:
    """How many of ``num_images`` may get another prediction if at least ``minimum_equal`` of all images get the same.

    >>> [allowed_to_differ(0.995, num) for num in (16, 256, 10000)]
    [1, 3, 64]
    """
    share = 1 - minimum_equal
    return max(int(share * num_images + 2 * (share * (1 - share) * num_images) ** 0.5), 1)


def has_other_predictions(parity: Parity, minimum_equal: float, num_images: int) -> bool:
    """Whether more predictions differ than chance, or PyTorch's own unsteadiness, explains."""
    different = round((1 - parity.equal_predictions) * num_images)
    unsteady = parity.mean_difference <= OWN_FACTOR * parity.own_difference
    return not unsteady and different > allowed_to_differ(minimum_equal, num_images)


def check(parity: Parity, minimum_equal: float, num_images: int) -> None:
    """Raise if the engine disagrees.

    A few images too many may be chance: that the share is too low has to show at two standard deviations, and of few
    images one may differ in any case. Where PyTorch itself, summing in another order, is about as far from its own
    logits, the engine cannot do better. The layers have to agree all the same.

    Raises:
        ParityError: it names the worst layer and by how much it is off.
    """
    wrong = wrong_rows(parity)
    if wrong:
        worst = min(wrong, key=lambda row: row.equal)
        raise ParityError(
            f"the engine disagrees with PyTorch: {len(wrong)} of {len(parity.codes)} places, worst {worst.name}: "
            f"{worst.equal:.3%} of its values are equal (at least {MINIMUM_EQUAL_CODES:.1%} have to be), largest "
            f"difference {worst.largest:.4g}; nothing was written"
        )
    if has_other_predictions(parity, minimum_equal, num_images):
        different = round((1 - parity.equal_predictions) * num_images)
        raise ParityError(
            f"the engine predicts another class than PyTorch for {different} of {num_images} images (at most "
            f"{1 - minimum_equal:.1%} may differ), though each layer agrees within its rounding; logits differ by "
            f"{parity.mean_difference:.3g} on average, in PyTorch itself by {parity.own_difference:.3g}; "
            "nothing was written; train longer, or lower minimum_equal for a network that hardly learned"
        )


def _shaped(expected: Reference, cut: Cut) -> Array:
    """Codes in PyTorch's shape; where the exporter moved a quantizer in front of a view, in the shape there."""
    codes = expected.codes[(cut.quantizer, cut.call)]
    # Not by the number of images: the view may be the one that folds windows into the batch.
    return codes if cut.shape is None else codes.reshape((-1, *cut.shape))


def _predictions(logits: Array) -> Array:
    return logits.reshape(len(logits), -1).argmax(1)
