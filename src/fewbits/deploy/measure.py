"""``measure_kernels``: the times by which ``export`` chooses the kernels of layers on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from . import kernels
from .choosing import REPEATS
from .engines import ENGINES
from .kernels import Kind
from .prepare import prepare

if TYPE_CHECKING:
    from .graph import Normalisation


def measure_kernels(
    student: nn.Module,
    *,
    example: Tensor,
    normalisation: Normalisation | Literal["trained"] | None = "trained",
    engine: str = "openvino",
    threads: int = 1,
    repeats: int = REPEATS,
) -> dict[str, dict[Kind, float]]:
    """Measure every layer that has a choice of kernels, each alone, and keep the times for exports on this machine.

    Args:
        student: as for ``export``.
        example: images in 0..1, N x C x H x W; only their size counts.
        normalisation: as for ``export``.
        engine: ``"openvino"``; in ONNX Runtime there is nothing to choose.
        threads: of the engine.
        repeats: measurements of each layer on each kernel.

    Returns:
        Milliseconds of one image by kernel, by bits and shape of the layer.

    Raises:
        ImportError: the engine is not installed.
        ValueError: as ``export``; an engine without a choice.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    for name, value in (("threads", threads), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    network, traced, _, _ = prepare(student, example, normalisation)
    found = ENGINES[engine].candidates(traced, network)
    times = ENGINES[engine].measure(found, network, threads=threads, repeats=repeats)
    kernels.store(kernels.table_path(), kernels.machine(engine, threads), times)
    return times
