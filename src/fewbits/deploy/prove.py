"""``prove``: an exported file against the network it is said to come from, layer by layer."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor, nn

from . import seal
from .export import read_care
from .prepare import prepare
from .result import CodeRow
from .variants import VARIANTS, variant_of

if TYPE_CHECKING:
    from .graph import Normalisation


@dataclass(frozen=True)
class Proof:
    """How far a file is from PyTorch.

    Args:
        engine: that the file is for.
        codes: each activation quantizer in the order in which they run, fed PyTorch's own codes; then the logits.
        first: the first place where codes differ at all, None if none do.
        equal_predictions: share of images with the same prediction.
        max_difference, mean_difference: of logits of the whole network.
        own_difference: the mean between two orders of summation in PyTorch itself.
    """

    engine: str
    codes: tuple[CodeRow, ...]
    first: CodeRow | None
    equal_predictions: float
    max_difference: float
    mean_difference: float
    own_difference: float


def prove(
    student: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor,
    normalisation: Normalisation | Literal["trained"] | None = "trained",
) -> Proof:
    """Push the same images through ``student`` in PyTorch and through ``path`` in its engine, layer by layer.

    The graph is built again from the student and has to be the file's, weights byte for byte and logits bit for bit:
    what is then found out about its layers is true of the file.

    Args:
        student: the network that was exported.
        path: of the file.
        example: real images in 0..1, N x C x H x W.
        normalisation: as for ``export``.

    Raises:
        ImportError: the engine is not installed.
        ValueError: there is no such file, it is damaged, or it does not come from this student.
    """
    file = Path(path)
    metadata = seal.check(file, student, normalisation)
    name, variant = variant_of(file)
    engine = VARIANTS[name][variant]
    network, traced, images, normalisation = prepare(student, example, normalisation)
    from . import parity
    from .graph import INPUT, OUTPUT

    built = engine.build(traced, network, metadata, read_care(metadata))
    logits = engine.open(file).run({INPUT: images.numpy()})[OUTPUT]
    with tempfile.TemporaryDirectory() as folder:
        again = engine.write(built, Path(folder) / file.name)
        # OpenVINO numbers the names in its XML anew each time; all weights are in the file beside it.
        same = all(
            (file.parent / other.name).read_bytes() == other.read_bytes() for other in again if other.suffix != ".xml"
        )
        same = same and np.array_equal(engine.open(again[0]).run({INPUT: images.numpy()})[OUTPUT], logits)
    if not same:
        raise ValueError(
            f"{file.name} is not what this student exports to: it comes from another run or another version of "
            "fewbits, or is damaged; export again"
        )
    expected = parity.reference(network, images, normalisation, built.cuts)
    found = parity.compare(built.proto, expected, images, built.cuts, engine)
    first = next((row for row in found.codes if row.bits < 32 and row.equal < 1), None)
    return Proof(
        name,
        found.codes,
        first,
        found.equal_predictions,
        found.max_difference,
        found.mean_difference,
        found.own_difference,
    )
