"""Reading finished runs: the student, the data, the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .. import data as datasets
from .. import models
from ..data import Dataset, Normalisation
from ..runs import student_architecture
from ..training import read_json, read_metrics
from ..training.folder import RUN, STUDENT

NEEDED = {"data": {"name", "classes", "channels", "image_size"}, "normalisation": {"mean", "std"}}
"""Entries of ``run.json`` that a run is rebuilt from."""

RANGE_BATCHES = 8
"""Training batches whose ranges are averaged when dynamic ranges are frozen."""


def load_run(folder: Path) -> tuple[nn.Module, Normalisation]:
    """The trained student of a finished run, in eval mode, and the normalisation of its input.

    Raises:
        ValueError: the folder holds no run, or one that is not finished, or files that do not belong together.
    """
    run = read_json(folder / RUN)
    if not (folder / STUDENT).exists():
        raise ValueError(f"{folder} holds a run that is not finished; continue it with train --resume")
    if "model" not in run:
        raise ValueError(f"{folder} was trained from Python on a network without a name; load its student yourself")
    check_run(run, folder)
    network = student_architecture(run)
    models.load_into(network, models.load_weights(folder / STUDENT), what=str(folder / STUDENT))
    shift, scale = run["normalisation"]["mean"], run["normalisation"]["std"]
    return network.eval(), Normalisation(tuple(shift), tuple(scale))


def check_run(run: dict[str, Any], folder: Path) -> None:
    """What networks and data are rebuilt from is there; another program, or an editor, may have been at ``run.json``.

    Raises:
        ValueError: entries are missing; the message names them.
    """
    entries = {"recipe_name", "recipe_options"} - run.keys()
    for part, needed in NEEDED.items():
        held = run.get(part)
        entries |= {f"{part}.{name}" for name in needed - (held.keys() if isinstance(held, dict) else set())}
    if entries:
        raise ValueError(
            f"{folder / RUN} is damaged: it lacks {', '.join(sorted(entries))}; put back the file that training wrote, "
            "or train again"
        )


def run_data(folder: Path, root: Path | None = None) -> Dataset:
    """The data set of a run."""
    run = read_json(folder / RUN)
    check_run(run, folder)
    data = datasets.load(run.get("data_source", run["data"]["name"]), root, False, run["data"]["image_size"])
    # A run that was tuned on held-out images is measured on them: nothing else touches the real test split.
    data = data.hold_out(run["hold_out"], seed=0) if run.get("hold_out") else data
    return data.per_class(run["per_class"], seed=run["settings"]["seed"]) if run.get("per_class") else data


def other_data(folder: Path, name: str, root: Path | None = None) -> Dataset:
    """Another data set at the run's image size.

    Raises:
        ValueError: its images have other channels than the run's.
    """
    run = read_json(folder / RUN)
    data = datasets.load(name, root, False, run["data"]["image_size"])
    if data.channels != run["data"]["channels"]:
        raise ValueError(
            f"data {name!r} has {data.channels} channels, the run's network takes {run['data']['channels']}; "
            "name a data set like the run's, or leave --data out"
        )
    return data


def with_frozen_ranges(student: nn.Module, folder: Path, data: Dataset, normalisation: Normalisation) -> nn.Module:
    """The student with the ranges that ``fewbits export --freeze-ranges`` gives it, every time the same.

    They come from a few of the run's training batches, of its batch size: dynamic ranges depend on that.
    """
    from ..deploy import freeze_ranges

    size = min(read_json(folder / RUN)["settings"]["batch_size"], data.train.num_samples)
    batches = data.train.batches(batch_size=size, normalisation=normalisation, shuffle=True, drop_last=True)
    return freeze_ranges(student, (images for _, (images, _labels) in zip(range(RANGE_BATCHES), batches, strict=False)))


def is_frozen(folder: Path, file: Path) -> bool:
    """Whether ``fewbits export --freeze-ranges`` wrote ``file``, by the reports in the run folder."""
    reports = (read_json(path) for path in sorted(folder.glob("export*.json")))
    return any(report.get("file") == file.name and report.get("frozen_ranges") for report in reports)


def onnx_files(folder: Path) -> list[Path]:
    """The run's files for ONNX Runtime, the one with frozen ranges last; student.onnx where none was exported."""
    files = [folder / "student.onnx", folder / "student-frozen.onnx"]
    return [file for file in files if file.exists()] or files[:1]


def exported_files(folder: Path) -> dict[str, Path]:
    """Every file that ``fewbits export`` left in the run folder, of any engine and variant, by a name for tables."""
    found = [path for suffix in (".onnx", ".xml") for path in sorted(folder.glob(f"student*{suffix}"))]
    named: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: path.stem):
        name = path.stem.replace("-", ", ")
        named[path.name if name in named else name] = path
    return named


def run_result(folder: Path) -> dict[str, Any]:
    """The last record of a finished run.

    Raises:
        ValueError: it is not finished.
    """
    records = [record for record in read_metrics(folder) if record["event"] == "end"]
    if not records:
        raise ValueError(f"{folder} holds a run that is not finished; continue it with train --resume")
    return records[-1]
