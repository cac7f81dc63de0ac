"""``probe``: which engines are installed, and which kernels they really take at which bits on this machine."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from ..calibration import calibrate
from ..convert import quantize
from .engines import ENGINES
from .export import export
from .result import ParityError

WIDTHS = (8, 4, 2, 1)
CHANNELS, SIZE, IMAGES = 16, 8, 4


@dataclass(frozen=True)
class Probed:
    """What an engine did.

    Args:
        engine: its name.
        version: installed, or what to install.
        bits: of weights and activations.
        kernel: that it took; or why there is none.
    """

    engine: str
    version: str
    bits: str
    kernel: str


def probe() -> list[Probed]:
    """Export a small convolution for each engine at each width, and read what it became."""
    found = []
    for engine in ENGINES:
        try:
            installed = version(engine)
        except PackageNotFoundError:
            extra = "onnx" if engine == "onnxruntime" else engine
            found.append(Probed(engine, "not installed", "", f'pip install "fewbits[{extra}]"'))
            continue
        found += [Probed(engine, installed, f"{bits}/{bits}", _kernel(engine, bits)) for bits in WIDTHS]
    return found


def _kernel(engine: str, bits: int) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(CHANNELS * (SIZE - 4) ** 2, 2))
        images = torch.rand(IMAGES, 3, SIZE, SIZE)
    student = quantize(network, bits, bits)
    calibrate(student, [images])
    suffix = ENGINES[engine].suffixes[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(folder) / f"probe{suffix}"
            made = export(
                student,
                path,
                example=images,
                normalisation=None,
                engine=engine,
                minimum_equal=0.0,
                kernels="default",  # what the engine can do, whatever is the fastest here
            )
        except ParityError as error:
            return f"wrong results: {error}"
    row = made.layers[1]
    return row.kernel + (f" ({row.reason})" if row.reason else "")
