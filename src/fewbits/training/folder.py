"""A run's folder: ``run.json``, ``metrics.jsonl``, ``student.safetensors`` and ``checkpoint/``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import FILE, write_file

RUN = "run.json"
METRICS = "metrics.jsonl"
STUDENT = "student.safetensors"
STUDENT_EMA = "student-ema.safetensors"
CHECKPOINT = "checkpoint"

FREE = (
    *("output", "resume", "progress", "checkpoint_seconds", "tensorboard", "gradient_shares", "recompute"),
    *("torch_threads", "versions"),
)
"""Entries of ``run.json`` that may differ when a run is resumed: they do not change its result, or say where it ran."""


def as_data(value: Any) -> Any:
    """A frozen dataclass, and what it holds, as JSON values; classes are named under ``"is"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): as_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return value


class RunFolder:
    """A folder for one run, that refuses to mix two. Nothing is written before ``begin``.

    Args:
        path: the folder; it need not be there.
        description: what makes the run; becomes ``run.json``.
        resume: whether a run that is there may be continued.

    Raises:
        ValueError: the folder holds a run and ``resume`` is off, or the run there was made by something else; or there
            is a file where the folder should be.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._is_begun = False
        self._described = json.loads(json.dumps(as_data(dict(description)), sort_keys=True))
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise ValueError(f"output must be a folder, but {nearest} is a file; choose another place")
        if path.exists() and any(path.iterdir()) and not resume:
            if (path / RUN).exists():
                raise ValueError(
                    f"output folder {path} already holds a run; pass --resume to continue it, or choose another folder"
                )
            raise ValueError(f"output folder {path} is not empty and holds no run; choose another folder")
        if self._is_started:
            _check_same(read_json(path / RUN), self._described, path)

    def begin(self, step: int) -> None:
        """Make the folder ready to go on behind ``step``, or afresh."""
        self.path.mkdir(parents=True, exist_ok=True)
        for litter in [*self.path.glob(".*.part"), *self.checkpoint.glob(".*.part")]:
            litter.unlink(missing_ok=True)  # of a process that was killed while it wrote
        self._is_begun = True
        if not self._is_started:
            write_file(self.path / RUN, (json.dumps(self._described, indent=2, sort_keys=True) + "\n").encode())
        self._forget_after(step)

    def undo_start(self) -> None:
        """Leave the folder as it was found if not even a first step came to pass: it is free for the next try."""
        if self._is_begun and not self._is_started and not self.metrics():
            for file in (RUN, METRICS):
                (self.path / file).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            with contextlib.suppress(OSError):  # something of the user's is in it
                self.path.rmdir()

    @property
    def _is_started(self) -> bool:
        """Whether there is anything to continue; a run that never got to its first checkpoint starts afresh."""
        return self.is_finished or (self.checkpoint / FILE).exists()

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint lies."""
        return self.path / CHECKPOINT

    @property
    def is_finished(self) -> bool:
        """The student is written last."""
        return (self.path / STUDENT).exists()

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far."""
        return read_metrics(self.path)

    def _forget_after(self, step: int) -> None:
        """Drop records of what a resumed run does again: later steps, and the end."""
        kept = [record for record in self.metrics() if record["step"] <= step and record["event"] != "end"]
        content = "".join(json.dumps(record, sort_keys=True) + "\n" for record in kept)
        write_file(self.path / METRICS, content.encode())

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; NaN and infinity, which JSON does not have, become null."""
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no run folder: {path.name} is missing") from None
    except NotADirectoryError:
        raise ValueError(f"{path.parent} is no run folder: it is a file; give the folder that training wrote") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that a killed process left half-written is dropped."""
    path = folder / METRICS
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _check_same(existing: Mapping[str, Any], described: Mapping[str, Any], path: Path) -> None:
    old, new = _flat(existing), _flat(described)
    differing = [
        f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(part in FREE for part in key.split("."))
    ]
    if differing:
        raise ValueError(
            f"cannot resume {path} with other settings than its own: {'; '.join(differing)}; "
            "use the run's settings, or another output folder"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, entry in value.items():
            flat |= _flat(entry, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
