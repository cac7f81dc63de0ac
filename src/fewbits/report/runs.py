"""What a run folder says about its run, read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import read_json, read_metrics
from ..training.folder import METRICS, RUN

EXPORT, BENCH, SUMMARY = "export.json", "bench.json", "summary.json"
EXPORTS = (EXPORT, "export-openvino.json", "export-frozen.json", "export-openvino-frozen.json")
"""The first that there is is shown."""


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: of its folder, with as much of the path as it takes to tell the runs apart.
        made_by: ``run.json``.
        records: ``metrics.jsonl``.
        export: ``export.json``, or else the first of ``EXPORTS``; empty where the run was not exported.
        bench: rows of ``bench.json``; empty where it was not measured.
        summary: ``summary.json``; empty where there is none.
    """

    name: str
    made_by: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    export: dict[str, Any]
    bench: tuple[dict[str, Any], ...]
    summary: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """The end is recorded last."""
        return self.end is not None

    @property
    def end(self) -> dict[str, Any] | None:
        """The last record of a finished run."""
        return next((record for record in self.records if record["event"] == "end"), None)

    def evaluations(self) -> Iterator[dict[str, Any]]:
        """Records with an accuracy, before the end."""
        yield from (r for r in self.records if r["event"] == "evaluation" and number(r, "accuracy") is not None)

    @property
    def accuracy(self) -> float | None:
        """Of the student after its last step, 0 to 1; of its last evaluation while the run goes on."""
        if self.end is not None:
            return number(self.end, "accuracy")
        return next((number(r, "accuracy") for r in reversed(list(self.evaluations())) if of_student(r)), None)

    @property
    def best_accuracy(self) -> float | None:
        """Of the student's best evaluation."""
        if self.end is not None and (best := number(self.end, "best_accuracy")) is not None:
            return best
        return max((number(r, "accuracy") or 0.0 for r in self.evaluations() if of_student(r)), default=None)

    @property
    def plan(self) -> dict[str, Any] | None:
        """How the network is quantized; None for a float one."""
        plan = self.made_by.get("plan")
        return plan if isinstance(plan, dict) else None

    @property
    def recipe(self) -> str:
        """Its name, or nothing."""
        recipe = self.made_by.get("recipe")
        return str(recipe.get("name", "")) if isinstance(recipe, dict) else ""

    @property
    def size_bytes(self) -> float | None:
        """Of the exported file."""
        return number(self.export, "size_bytes")

    @property
    def size_ratio(self) -> float | None:
        """How many times smaller than in float the exported file is."""
        size, whole = self.size_bytes, number(self.export, "float_bytes")
        return whole / size if size and whole else number(self.export, "ratio")

    @property
    def latency(self) -> dict[str, Any] | None:
        """The row of the student at its smallest batch, measured with the fewest threads."""
        rows = [r for r in self.bench if not is_float(r) and number(r, "latency_ms") is not None]
        return min(rows, key=lambda r: (number(r, "batch_size") or 0, number(r, "threads") or 0), default=None)


def of_student(record: Mapping[str, Any]) -> bool:
    """Whether a record is about the student: phases may train the teacher, and evaluations name the network."""
    return record.get("network", "teacher" if record.get("phase") == "teacher" else "student") == "student"


def is_float(row: Mapping[str, Any]) -> bool:
    """Whether a row of a benchmark is the float network's."""
    return str(row.get("name", "")).startswith("float")


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A number, or None where it is absent or not finite.

    Raises:
        ValueError: something else stands there.
    """
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return float(value) if math.isfinite(value) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read ``folders``, in their order.

    Raises:
        ValueError: there is none, or one is no run folder, or holds a damaged file; the message names it.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("folders is empty; name at least one run folder")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run folder: {'not a folder' if folder.exists() else 'it does not exist'}")
    made_by = read_json(folder / RUN)
    exported = next((name for name in EXPORTS if (folder / name).exists()), EXPORT)
    extra = {file: read_json(folder / file) if (folder / file).exists() else {} for file in (exported, BENCH, SUMMARY)}
    bench = extra[BENCH].get("rows", [])
    if not isinstance(bench, list) or not all(isinstance(row, dict) for row in bench):
        raise ValueError(f"{folder / BENCH} is damaged: 'rows' is no list of objects")
    run = Run(name, made_by, tuple(_records(folder)), extra[exported], tuple(bench), extra[SUMMARY])
    for file, values in ((METRICS, run.records), (exported, (run.export,)), (BENCH, run.bench)):
        try:
            for entry in values:
                for key in _NUMBERS & entry.keys():
                    number(entry, key)
        except ValueError as error:
            raise ValueError(f"{folder / file} is damaged: {error}") from error
    _check_summary(folder / SUMMARY, run.summary)
    return run


_NUMBERS = {
    *("step", "epoch", "loss", "accuracy", "best_accuracy", "seconds", "skipped_steps"),
    *("size_bytes", "theoretical_bytes", "float_bytes", "ratio", "max_difference", "equal_predictions"),
    *("accuracy_pytorch", "accuracy_engine", "batch_size", "threads", "latency_ms", "load_ms"),
}  # fmt: skip


def _records(folder: Path) -> list[dict[str, Any]]:
    records: list[Any]  # whatever JSON holds
    try:
        records = list(read_metrics(folder))
        lines = (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / METRICS} is damaged: {error}") from error
    # A killed process leaves half a line at the very end, and only there.
    if len(records) < len(lines) - 1:
        raise ValueError(f"{folder / METRICS} is damaged in line {len(records) + 1}")
    for index, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not {"event", "step", "epoch"} <= record.keys():
            raise ValueError(f"{folder / METRICS} is damaged in line {index}: no event, step and epoch")
    return records


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    if not summary:
        return
    rows, totals = summary.get("rows"), summary.get("totals")
    is_whole = isinstance(rows, list) and all(isinstance(r, dict) and "name" in r for r in rows)
    if not is_whole or not isinstance(totals, dict):
        raise ValueError(f"{path} is damaged: it has no rows and totals")


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts[1:] or ("/",) for folder in folders]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"folders names a run twice: {', '.join(str(f) for f in folders)}")
