"""Size, load time, latency and memory of exported files, side by side in one run; accuracy inside the engine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .costs import Cost
from .engines import ENGINES, Session, engine_of
from .memory import INPUT, OUTPUT, peaks

ROUNDS = 3
"""How often each file's turn comes; what slows the machine down for a while then hits all of them."""


@dataclass(frozen=True)
class BenchRow:
    """One file at one batch size.

    Args:
        name: as it was given.
        batch_size: images at a time.
        threads: of the engine.
        size_bytes: of the file.
        load_ms: median time to load it, unpacking and fusing included.
        latency_ms: median time of one batch.
        images_per_second: what follows from it.
        memory_bytes: what loading and running the file adds to a process at most; None where it was not measured.
        ratio: latency over that of the first file (float, if it was given first); below 1 is faster.
        verdict: the ratio in words.
    """

    name: str
    batch_size: int
    threads: int
    size_bytes: int
    load_ms: float
    latency_ms: float
    images_per_second: float
    memory_bytes: int | None
    ratio: float
    verdict: str


def bench(
    paths: Mapping[str, str | os.PathLike[str]],
    example: Tensor,
    *,
    threads: int = 1,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 30,
    memory: bool = False,
) -> list[BenchRow]:
    """Measure exported files beside each other: A B A B, with one session alive at a time.

    Args:
        paths: files by name; the first one is what the others are compared with.
        example: images in 0..1, N x C x H x W; repeated where a batch is larger.
        threads: of the engine.
        batch_sizes: images at a time.
        repeats: measurements of each file at each batch size.
        memory: whether to measure peak memory as well, in a process of its own for each file (Linux only).

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: nothing to measure, a file that does not load, counts below 1.
    """
    if not paths:
        raise ValueError("paths holds no file; pass at least one, the float network first")
    for name, value in (("threads", threads), ("repeats", repeats), ("batch_sizes", min(batch_sizes, default=0))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if example.ndim != 4 or len(example) == 0:
        raise ValueError(f"example must be a batch of images, N x C x H x W, got {tuple(example.shape)}")
    files = {name: Path(path) for name, path in paths.items()}
    images = example.detach().cpu().float().numpy()
    batches = {size: np.resize(images, (size, *images.shape[1:])) for size in batch_sizes}
    loads: dict[str, list[float]] = {name: [] for name in files}
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for name in files for size in batch_sizes}
    for turn in range(ROUNDS):
        share = repeats // ROUNDS + (turn < repeats % ROUNDS)
        for name, path in files.items():
            loaded, measured = _turn(path, batches, threads, share)
            loads[name].append(loaded)
            for size, values in measured.items():
                times[name, size] += values
    first = next(iter(files))
    sizes = sorted(set(batch_sizes))
    held: dict[tuple[str, int], int] = {}
    for name, path in files.items() if memory else ():
        found = peaks(path, images.shape[1:], sizes, threads=threads)
        held |= {(name, size): peak for size, peak in zip(sizes, found or (), strict=False)}
    rows = []
    for size in batch_sizes:
        reference = statistics.median(times[first, size])
        for name, path in files.items():
            latency = statistics.median(times[name, size])
            load, ratio = statistics.median(loads[name]), latency / reference
            verdict = "" if name == first else _verdict(first, ratio)
            speed, peak = 1e3 * size / latency, held.get((name, size))
            rows.append(BenchRow(name, size, threads, size_of(path), load, latency, speed, peak, ratio, verdict))
    return rows


def accuracy(path: str | os.PathLike[str], batches: Iterable[tuple[Tensor, Tensor]], *, threads: int = 1) -> float:
    """Share of images that the file classifies rightly, in the engine that the file is for.

    Args:
        path: an exported file.
        batches: images in 0..1 (N x C x H x W) and labels (N).
        threads: of the engine.

    Returns:
        0 to 1.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: the file does not load, or there is no image.
    """
    session = _open(Path(path), threads)
    right = total = 0
    for images, labels in batches:
        logits = session.run({INPUT: images.detach().cpu().float().numpy()})[OUTPUT]
        right += int((logits.argmax(-1) == labels.detach().cpu().numpy()).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("batches holds no image; accuracy needs at least one")
    return right / total


def costs(
    path: str | os.PathLike[str], example: Tensor, *, batch_size: int = 1, threads: int = 1, repeats: int = 30
) -> list[Cost]:
    """What each layer of a file takes in its engine, the most expensive first.

    Args:
        path: an exported file.
        example: images in 0..1, N x C x H x W; repeated where a batch is larger.
        batch_size: images at a time.
        threads: of the engine.
        repeats: measurements.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: the file does not load.
    """
    path = Path(path)
    images = example.detach().cpu().float().numpy()
    feeds = {INPUT: np.resize(images, (batch_size, *images.shape[1:]))}
    return ENGINES[engine_of(path)].costs(path, feeds, threads=threads, repeats=repeats)


def size_of(path: Path) -> int:
    """Bytes of a file, and of the weights that OpenVINO keeps beside its own."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" and weights.is_file() else 0)


def _turn(path: Path, batches: Mapping[int, Any], threads: int, repeats: int) -> tuple[float, dict[int, list[float]]]:
    """Load time, and latencies by batch size, in milliseconds; the session is gone afterwards."""
    start = time.perf_counter()
    session = _open(path, threads)
    session.prepare({INPUT: next(iter(batches.values()))})
    loaded = 1e3 * (time.perf_counter() - start)
    measured: dict[int, list[float]] = {}
    for size, images in batches.items():
        feed = {INPUT: images}
        session.run(feed)  # the first run of a shape plans its memory
        values = []
        for _ in range(repeats):
            start = time.perf_counter()
            session.run(feed)
            values.append(1e3 * (time.perf_counter() - start))
        measured[size] = values
    return loaded, measured


def _verdict(first: str, ratio: float) -> str:
    if ratio > 1:
        return f"{ratio:.2f}x the time of {first}: slower on this machine"
    return f"{1 / ratio:.2f}x faster than {first}"


def _open(path: Path, threads: int) -> Session:
    return ENGINES[engine_of(path)].open(path, threads=threads)
