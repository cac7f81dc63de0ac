"""``fewbits parity`` and ``fewbits engines``: what a file computes, and what could run one here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from .runs import is_frozen, load_run, onnx_files, other_data, run_data, with_frozen_ranges


@dataclass(frozen=True)
class Parity:
    """Push real test images through PyTorch and through an exported file, layer by layer, and say where codes differ.

    Each layer of the file is fed PyTorch's own codes, so that a difference is counted where it is made. Exit code 1
    and no table if the file does not come from the run.

    Args:
        run: a finished run folder.
        file: what was exported from it; by default student.onnx in the folder, or else student-frozen.onnx.
        images: how many test images.
        data: where they come from, as fewbits train takes it, at the run's image size; by default the run's own data.
        data_root: the folder that holds the data sets.
    """

    run: Path
    file: Positional[Path | None] = None
    images: int = 256
    data: str | None = None
    data_root: Path | None = None


@dataclass(frozen=True)
class Engines:
    """List the inference engines that are installed, and what each runs on this machine at which bits."""


def parity(config: Parity) -> Any:
    """Carry out ``config``."""
    from ..deploy import prove

    if config.images < 1:
        raise ValueError(f"images must be at least 1, got {config.images}")
    student, normalisation = load_run(config.run)
    data = run_data(config.run, config.data_root)
    images = (other_data(config.run, config.data, config.data_root) if config.data else data).pixels(config.images)
    file = config.file or onnx_files(config.run)[0]
    if is_frozen(config.run, file):
        student = with_frozen_ranges(student, config.run, data, normalisation)
    found = prove(student, file, example=images, normalisation=normalisation)
    table = Table("place", "bits", "equal codes, %", "largest, steps", title=f"{file.name} in {found.engine}")
    for row in found.codes:
        table.add_row(row.name, "" if row.bits == 32 else str(row.bits), f"{100 * row.equal:.4f}", f"{row.largest:.2g}")
    console = Console()
    console.print(table)
    where = "nowhere" if found.first is None else f"first at {found.first.name} ({1 - found.first.equal:.2e} of them)"
    console.print(f"Codes differ {where}. The last row is in logits.", highlight=False)
    console.print(
        f"Whole network, {len(images)} images: {100 * found.equal_predictions:.2f} % equal predictions, logits differ "
        f"by {found.mean_difference:.2g} on average, in PyTorch itself by {found.own_difference:.2g}.",
        highlight=False,
    )
    return found


def engines(config: Engines) -> list[dict[str, str]]:
    """Carry out ``config``: each engine is given small networks, and says which kernels it takes for them."""
    from ..deploy import probe

    rows = [{"engine": row.engine, "version": row.version, "bits": row.bits, "kernel": row.kernel} for row in probe()]
    table = Table("engine", "version", "weights/activations", "kernel of a 3x3 convolution")
    for entry in rows:
        table.add_row(*entry.values())
    Console().print(table)
    return rows
