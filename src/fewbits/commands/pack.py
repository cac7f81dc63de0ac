"""``fewbits pack``: the trained student as one small file for PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from ..training import read_json
from ..training.folder import RUN
from .runs import load_run

if TYPE_CHECKING:
    from ..deploy import Packed

NUM_IMAGES = 8
"""Random images that the file is proved on: equal bit for bit is equal on all."""


@dataclass(frozen=True)
class Pack:
    """Write the student of a run as one safetensors file of packed codes, for fewbits.load_packed in PyTorch.

    It is read back, and has to give the same outputs bit for bit, before it is put in place.

    Args:
        run: a finished run folder.
        output: the file; by default student-packed.safetensors in the run folder.
    """

    run: Path
    output: Path | None = None


def pack(config: Pack) -> Packed:
    """Carry out ``config``.

    Raises:
        ValueError: the run is not finished, or float.
        ParityError: what was read back is not the student; no file is left.
    """
    from ..deploy import pack as pack_student
    from ..deploy.packed_file import PACKED_FILE

    student, _ = load_run(config.run)
    data = read_json(config.run / RUN)["data"]
    sizes = (NUM_IMAGES, data["channels"], data["image_size"], data["image_size"])
    images = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    path = config.output or config.run / PACKED_FILE
    packed = pack_student(student, path, run=config.run, example=images)
    size = f"{packed.size_bytes:,} bytes, float {packed.float_bytes:,} ({packed.float_bytes / packed.size_bytes:.1f}x)"
    bits = f"theoretical size of its bits {packed.theoretical_bytes:,}, with running statistics {packed.saved_bytes:,}"
    bits += f"; {packed.num_layers} layers packed"
    Console(soft_wrap=True).print(f"{packed.path}: {size}, {bits}", highlight=False, markup=False)
    return packed
