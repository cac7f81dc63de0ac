"""``fewbits bench``: exported files measured beside the float network."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from .. import models
from ..convert import float_state
from ..data import Dataset, Normalisation
from ..runs import float_architecture, restructured
from ..training import read_json
from ..training.folder import RUN
from .kernels import measure
from .machine import machine
from .runs import exported_files, is_frozen, load_run, onnx_files, run_data, with_frozen_ranges
from .ship import Export, export

ALL = 0
"""As a number of threads: one for each core."""


@dataclass(frozen=True)
class Bench:
    """Measure size, load time, latency, throughput and peak memory of an exported run beside float, interleaved.

    Args:
        run: a run folder; it is exported for ONNX Runtime first if that has not been done. Every file that export
            left there takes part, those for OpenVINO beside the float network in that engine.
        threads: of the engine, one or several; 0 is one for each core.
        batch_sizes: images at a time.
        repeats: measurements of each.
        memory: measure peak memory too, in a process of its own for each file (Linux only).
        layers: how many of the most expensive layers of each of the student's files are named.
        kernels: measure instead, alone, every layer of the run on every kernel that it can have in OpenVINO, and keep
            the times in the user's cache folder ($FEWBITS_CACHE, else ~/.cache/fewbits): export chooses by them.
        data_root: the folder that holds the data sets.
    """

    run: Path
    threads: tuple[int, ...] = (1, ALL)
    batch_sizes: tuple[int, ...] = (1, 64)
    repeats: int = 30
    memory: bool = True
    layers: int = 5
    kernels: bool = False
    data_root: Path | None = None


def bench(config: Bench) -> list[dict[str, Any]]:
    """Carry out ``config``; leaves ``bench.json`` in the run folder.

    Raises:
        ValueError: the run is not finished, counts below their least, a file that does not come from the run as it is.
    """
    from ..deploy import bench as bench_files
    from ..deploy import costs
    from ..deploy import export as export_student
    from ..deploy.engines import engine_of

    if config.layers < 0 or min(config.threads, default=-1) < 0:
        raise ValueError(f"layers and threads must be at least 0, got {config.layers} and {list(config.threads)}")
    cores = os.cpu_count() or 1
    threads = list(dict.fromkeys(number or cores for number in config.threads))
    if config.kernels:
        return measure(config.run, threads, config.repeats, config.data_root)
    if not onnx_files(config.run)[0].exists():
        export(Export(config.run, data_root=config.data_root))
    student, normalisation = load_run(config.run)
    data = run_data(config.run, config.data_root)
    images = data.pixels(max(config.batch_sizes))
    students = exported_files(config.run)
    _check(students, config.run, student, data, normalisation)
    # The run folder's own file stays the only one of its kind there: the float network is measured from elsewhere.
    with tempfile.TemporaryDirectory() as elsewhere:
        float_path = Path(elsewhere) / "float.onnx"
        export_student(float_network(config.run, student), float_path, example=images, normalisation=normalisation)
        files = {"float": float_path, **students}
        if any(engine_of(path) == "openvino" for path in students.values()):
            float_other = Path(elsewhere) / "float.xml"
            network = float_network(config.run, student)
            export_student(network, float_other, example=images[:64], normalisation=normalisation, engine="openvino")
            files["float, openvino"] = float_other
        entries = [
            asdict(row)
            for number in threads
            for row in bench_files(
                files,
                images,
                threads=number,
                batch_sizes=config.batch_sizes,
                repeats=config.repeats,
                memory=config.memory and number == threads[0],
            )
        ]
    layers = {
        name: [asdict(cost) for cost in costs(file, images, repeats=config.repeats)]
        for name, file in (students.items() if config.layers else ())
    }
    measured = {"format": 1, "machine": machine(), "rows": entries, "layers": layers}
    (config.run / "bench.json").write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")
    console = Console()
    console.print(_table(entries))
    for name, found in layers.items():
        console.print(_most_expensive(name, found[: config.layers]), highlight=False)
    if read_json(config.run / RUN).get("plan") is None:
        console.print("This run is a float network: student and float are the same network, and their ratio is noise.")
        return entries
    for row in entries:
        if row["name"].startswith("student") and row["ratio"] > 1:
            where = f"batch {row['batch_size']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
            console.print(f"At {where} the low-bit network ({row['name']}) is slower than float here.")
    return entries


def float_network(folder: Path, student: nn.Module) -> nn.Module:
    """The float network of a run's architecture with the student's latent weights: what it is measured beside."""
    run = read_json(folder / RUN)
    network = restructured(float_architecture(run), run)
    models.load_into(network, float_state(student), what="the student's latent weights")
    return network.eval()


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=0,
        caption="ms: median of one call; ratio: to the first row of the block; MB: peak memory beyond the engine's own",
    )
    for heading in ("network", "batch", "thr.", "ms", "ratio", "images/s", "MB", "file kB", "load ms"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for row in entries:
        peak = row["memory_bytes"]
        table.add_row(
            row["name"],
            str(row["batch_size"]),
            str(row["threads"]),
            f"{row['latency_ms']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['images_per_second']:,.0f}",
            "-" if peak is None else f"{peak / 1e6:.1f}",
            f"{row['size_bytes'] / 1e3:,.1f}",
            f"{row['load_ms']:.0f}",
        )
    return table


def _most_expensive(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"{cost['name']} {1e3 * cost['ms']:.0f} us ({100 * cost['share']:.0f} %)" for cost in found]
    return f"{name}, most expensive at batch 1: {', '.join(parts)}"


def _check(
    files: Mapping[str, Path], folder: Path, student: nn.Module, data: Dataset, normalisation: Normalisation
) -> None:
    """A number beside the name of a network that it was not measured on would be worse than none."""
    from ..deploy import check_seal

    frozen = {path for path in files.values() if is_frozen(folder, path)}
    other = with_frozen_ranges(student, folder, data, normalisation) if frozen else student
    for path in files.values():
        check_seal(path, other if path in frozen else student, normalisation)
