"""``fewbits export``: the trained student as a file for an engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..convert import Plan, plan_of
from ..data import Dataset, Normalisation
from ..training import accuracy
from .kernels import explained, together
from .machine import machine
from .runs import load_run, run_data, with_frozen_ranges

DEFAULT_ENGINE, PACKED = "onnxruntime", "packed"

PARITY_IMAGES = 256
"""Real test images that every export is compared on, layer by layer."""


@dataclass(frozen=True)
class Export:
    """Write the student of a run as a bit-packed file for an inference engine, and prove that it computes the same.

    Args:
        run: a finished run folder.
        engine: onnxruntime or openvino.
        variant: packed, the engine's own fast form; for onnxruntime also qdq, plain int8 Q/DQ as TensorRT takes them,
            with a list of what it would not take, and int4, weights of 2 to 4 bits as ONNX's own types.
        output: the file; by default student.onnx in the run folder, student-qdq.onnx or student-int4.onnx for variants,
            for openvino student-openvino.onnx, which it reads as well, or student-openvino.xml with a .bin beside it
            for layers on XNOR kernels, which ONNX has no words for: of binary networks, and with one-bit weights and
            activations of two bits where they are the fastest by measured times.
        minimum_equal: share of images that must get the same prediction as in PyTorch; lower it only for a network that
            hardly learned, whose classes are a hair apart.
        freeze_ranges: fix the ranges that DTQ's min-max finds anew in every batch, so that integers can be used:
            another method, minmax-frozen, with files and a report of its own (student-frozen.onnx, export-frozen.json).
        kernels: how OpenVINO's kernel of a layer is chosen where several give the same codes: table takes the fastest
            by the times that were measured on this machine (fewbits bench RUN --kernels), measure measures them first,
            default takes XNOR for one-bit weights and signs and int8 for the rest, as table does for a layer that was
            never measured.
        threads: that OpenVINO will run with; kernels are chosen for them. 0 is one for each core.
        data_root: the folder that holds the data sets.
    """

    run: Path
    engine: str = "onnxruntime"
    variant: str = PACKED
    output: Path | None = None
    minimum_equal: float = 0.995
    freeze_ranges: bool = False
    kernels: Literal["table", "measure", "default"] = "table"
    threads: int = 1
    data_root: Path | None = None


def export(config: Export) -> dict[str, Any]:
    """Carry out ``config``; leaves the file and ``export.json`` in the run folder.

    Raises:
        ValueError: the run is not finished, or the engine unknown.
        ParityError: the engine does not compute what PyTorch does; no file is left.
    """
    from ..deploy import accuracy as engine_accuracy
    from ..deploy import export as export_student
    from ..deploy import measure_kernels
    from ..deploy.kernels import planes_win

    student, normalisation = load_run(config.run)
    data = run_data(config.run, config.data_root)
    if config.freeze_ranges:
        student = with_frozen_ranges(student, config.run, data, normalisation)
    images, threads, kernels = data.pixels(PARITY_IMAGES), config.threads or os.cpu_count() or 1, config.kernels
    if kernels == "measure" and config.engine == "openvino":
        measure_kernels(student, example=images[:1], normalisation=normalisation, engine=config.engine, threads=threads)
        kernels = "table"
    has_planes = kernels == "table" and config.engine == "openvino" and planes_win(config.engine, threads)
    name = default_name(
        config.engine, plan_of(student), config.variant, has_planes=has_planes, frozen=config.freeze_ranges
    )
    path = config.output or config.run / name
    exported = export_student(
        student,
        path,
        example=images,
        normalisation=normalisation,
        engine=config.engine,
        variant=config.variant,
        minimum_equal=config.minimum_equal,
        kernels=kernels,
        threads=threads,
    )
    report: dict[str, Any] = json.loads(json.dumps(asdict(exported), default=str))
    report |= {
        "engine": config.engine,
        "frozen_ranges": config.freeze_ranges,
        "file": path.name,
        "ratio": exported.float_bytes / exported.size_bytes,
        "accuracy_pytorch": accuracy(student, data.test.batches(batch_size=500, normalisation=normalisation)),
        "accuracy_engine": engine_accuracy(path, _pixels(data, 500)),
    }
    report |= {"format": 1, "num_images": PARITY_IMAGES, "machine": machine()}
    report.pop("path", None)
    kind = [part for part in (config.engine, config.variant) if part not in (DEFAULT_ENGINE, PACKED)]
    kind += ["frozen"] * config.freeze_ranges
    (config.run / f"{'-'.join(['export', *kind])}.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    Console().print(_export_table(report), highlight=False)
    return report


def default_name(
    engine: str, plan: Plan | None, variant: str = PACKED, *, has_planes: bool = False, frozen: bool = False
) -> str:
    """Of a run's file for an engine: ``.xml`` where a layer may run on the XNOR kernel, for ONNX has no word for it."""
    parts = ["student", *["frozen"] * frozen]
    if variant != PACKED:
        return f"{'-'.join([*parts, variant])}.onnx"
    if engine == DEFAULT_ENGINE:
        return f"{'-'.join(parts)}.onnx"
    is_binary = plan is not None and plan.weights == 1 and plan.activations <= (2 if has_planes else 1)
    return f"{'-'.join([*parts, engine])}.{'xml' if is_binary else 'onnx'}"


def _export_table(report: dict[str, Any]) -> Table:
    from ..deploy.kernels import FASTER

    table = Table(title=f"{report['file']} for {report['engine']}", show_header=False)
    table.add_row("size", f"{report['size_bytes']:,} bytes, float {report['float_bytes']:,} ({report['ratio']:.1f}x)")
    table.add_row("theoretical size of its bits", f"{report['theoretical_bytes']:,} bytes")
    table.add_row("equal predictions", f"{100 * report['equal_predictions']:.2f} % of {PARITY_IMAGES} test images")
    table.add_row("largest difference of a logit", f"{report['max_difference']:.3g}")
    own = f"PyTorch from itself {report['own_difference']:.2g}"
    table.add_row("mean difference of a logit", f"{report['mean_difference']:.2g}; {own}")
    table.add_row("accuracy in PyTorch", f"{100 * report['accuracy_pytorch']:.2f} %")
    table.add_row("accuracy in the engine", f"{100 * report['accuracy_engine']:.2f} %")
    if report["engine"] == "openvino":
        table.add_row(
            "compile it with",
            "INFERENCE_PRECISION_HINT=f32; in bfloat16, OpenVINO's own choice on some processors, results differ",
        )
    if report["frozen_ranges"]:
        table.add_row("method", "minmax-frozen: not the one that was trained, whose ranges are dynamic")
    if report["dynamic"]:
        num = len(report["dynamic"])
        table.add_row("dynamic ranges", f"in {num} places: an image's logits depend on the batch that it comes in")
    kernels = [layer for layer in report["layers"]]
    if report["variant"] == "qdq":
        _add_placement(table, report["misplaced"])
        return table
    faster = [layer for layer in kernels if layer.get("reason") == FASTER]
    in_float = [layer for layer in kernels if layer.get("reason") not in ("", FASTER)]
    on_integers = f"{len(kernels) - len(in_float) - len(faster)} of {len(kernels)}"
    by_choice = f", and {len(faster)} in float by choice, which is faster here" if faster else ""
    table.add_row("layers on integer kernels", on_integers + by_choice)
    for line in explained(kernels):
        table.add_row("kernel", line)
    for line in together(in_float, "reason"):
        table.add_row("in float", line)
    for line in together(kernels, "note"):
        table.add_row("not on the binary kernel", line)
    return table


def _add_placement(table: Table, misplaced: Sequence[Mapping[str, str]]) -> None:
    """What TensorRT would not take, each reason once."""
    nodes: dict[str, list[str]] = {}
    for row in misplaced:
        nodes.setdefault(row["reason"], []).append(f"{row['operator']} {row['name']}")
    for reason, found in nodes.items():
        table.add_row("not as TensorRT takes it", f"{', '.join(found)}: {reason}")
    verdict = f"{len(misplaced)} places break its rules" if misplaced else "every node follows its rules"
    table.add_row("TensorRT", f"{verdict}; read from the graph, TensorRT itself was not run")


def _pixels(data: Dataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Test images as pixels in 0..1: an exported file normalises by itself."""
    plain = Normalisation.identity(data.channels)
    with torch.no_grad():
        yield from data.test.batches(batch_size=batch_size, normalisation=plain)
