"""A frozen teacher's answers on disk: a picture that comes again, in another epoch or run, costs no pass of it.

Augmentation is a function of (seed, epoch, sample), so the pictures of one run are those of any other run with the same
seed. A folder holds one subfolder for each teacher, data set and way of computing, named by a digest of all of them:
answers of another teacher, or to other pictures, are never found. In it, each tensor that is read of the teacher has
two files: ``NAME.rows``, one row of float32 for each picture, and ``NAME.marks``, a checksum of each row, 0 where there
is none yet. Rows are written before their marks; several processes may share a folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..digest import digest_of
from ..distill import Objective
from .checkpoint import write_file
from .feed import Batch, Feed
from .settings import Settings

ABOUT = "about.json"


class TeacherCache:
    """What the objective's frozen teacher answers to the pictures of a run, from disk where it is there.

    Args:
        folder: for all teachers and data sets; made where it is missing.
        objective: of the phase; its ``answers`` say what is kept.
        feed: the pictures.
        settings: how they are computed.

    Raises:
        ValueError: the objective's teacher has no answers that last, what is in the folder belongs to something else,
            or the disk has no room.
    """

    def __init__(self, folder: Path, objective: Objective, feed: Feed, settings: Settings) -> None:
        if not objective.answers:
            raise ValueError(f"phase {objective.phase.name!r} reads nothing of a frozen teacher: nothing to cache")
        about = json.dumps(_about(objective, feed, settings), indent=2, sort_keys=True) + "\n"
        self.path = folder / hashlib.sha256(about.encode()).hexdigest()[:16]
        self._check(about)
        self._objective = objective
        self._teach = torch.compile(objective.teach, fullgraph=True) if settings.compile else objective.teach
        self._num_views = feed.num_views
        example = objective.networks.example
        shapes = [tuple(answer.shape[1:]) for answer in objective.teach(example)]
        self._tables = [
            _Table(self.path / name, feed.num_views, shape)
            for name, shape in zip(objective.answers, shapes, strict=True)
        ]
        self.num_bytes = sum(table.num_bytes for table in self._tables)
        self._check_room()
        self._asked = self._found = 0

    def _check(self, about: str) -> None:
        path = self.path / ABOUT
        if not path.exists():
            write_file(path, about.encode())
        elif path.read_text() != about:
            raise ValueError(f"{self.path} holds the answers of another teacher, or to other data; delete it")

    def _check_room(self) -> None:
        missing = self.num_bytes - sum(table.num_there() * table.row_bytes for table in self._tables)
        free = shutil.disk_usage(self.path).free
        if missing > free:
            raise ValueError(
                f"the teacher's answers need {missing / 1e6:,.1f} MB more in {self.path.parent}, where only "
                f"{free / 1e6:,.1f} MB are free ({self.describe()}); take another folder for teacher_cache, train "
                "fewer epochs, or leave it out"
            )

    def describe(self) -> str:
        """Size and content, for a person: what is kept of how many pictures."""
        there = min(table.num_there() for table in self._tables)
        return (
            f"{', '.join(self._objective.answers)} of {self._num_views:,} pictures, {self.num_bytes / 1e6:,.2f} MB; "
            f"{there:,} pictures are there"
        )

    def share(self) -> float:
        """Of the pictures since the last call, how many the teacher did not have to look at, 0 to 1."""
        share = self._found / max(self._asked, 1)
        self._asked = self._found = 0
        return share

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """The teacher's answers to a batch, one tensor for each of the objective's ``answers``.

        Raises:
            ValueError: a row is damaged.
            OSError: the disk is full; what was there is whole.
        """
        views = batch.views.numpy()
        device = batch.images.device
        self._asked += len(views)
        if all(table.has(views) for table in self._tables):
            self._found += len(views)
            return tuple(torch.from_numpy(table.read(views)).to(device) for table in self._tables)
        answers = tuple(answer.float() for answer in self._teach(batch.images))
        for table, answer in zip(self._tables, answers, strict=True):
            table.write(views, answer.contiguous().cpu().numpy())
        return answers


def open_cache(
    folder: Path | None, objective: Objective, feed: Feed, settings: Settings, say: Callable[[str], None]
) -> TeacherCache | None:
    """The cache of a phase, if there is a ``folder`` and the phase has use for one; ``say`` is told which it is."""
    if folder is None:
        return None
    name = objective.phase.name
    if not objective.answers:
        say(f"{name} reads nothing of a teacher that stays as it is: no answers to keep")
        return None
    cache = TeacherCache(folder, objective, feed, settings)
    say(f"{name} keeps its teacher's answers in {cache.path}: {cache.describe()}")
    return cache


class _Table:
    """Rows of float32 by their number, and which of them are there.

    Args:
        path: without the ending.
        num_rows: at least this many.
        shape: of a row.
    """

    def __init__(self, path: Path, num_rows: int, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self.row_bytes = 4 * prod(shape)
        self.num_bytes = num_rows * self.row_bytes
        self._rows, self._marks = (path.with_name(f"{path.name}.{kind}") for kind in ("rows", "marks"))
        _lengthen(self._rows, self.num_bytes)
        _lengthen(self._marks, 4 * num_rows)
        # Read through the map, written through the file: a full disk is an error there, and a dead process here.
        self._read_rows = np.memmap(self._rows, np.float32, "r", shape=(num_rows, prod(shape)))
        self._read_marks = np.memmap(self._marks, np.uint32, "r", shape=(num_rows,))

    def num_there(self) -> int:
        """Rows that have been written."""
        return int(np.count_nonzero(self._read_marks))

    def has(self, numbers: NDArray[np.int64]) -> bool:
        """Whether all these rows have been written."""
        return bool(self._read_marks[numbers].all())

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """These rows."""
        rows = self._read_rows[numbers]
        if not np.array_equal(_checksums(rows), self._read_marks[numbers]):
            raise ValueError(f"{self._rows} is damaged: rows differ from their checksums; delete its folder")
        return rows.reshape(-1, *self._shape)

    def write(self, numbers: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Rows first: a row that has no mark yet does not count."""
        rows = values.reshape(len(numbers), -1)
        _write_rows(self._rows, numbers, rows)
        _write_rows(self._marks, numbers, _checksums(rows)[:, None])


def _lengthen(path: Path, num_bytes: int) -> None:
    """Make the file at least so large; what was never written takes no room on the disk."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a shorter run that looked before a longer one lengthened must not cut it
        if file.seek(0, os.SEEK_END) < num_bytes:
            file.truncate(num_bytes)


def _write_rows(path: Path, numbers: NDArray[np.int64], rows: NDArray[Any]) -> None:
    with path.open("r+b", buffering=0) as file:
        for number, row in zip(numbers.tolist(), rows, strict=True):
            try:
                written = os.pwrite(file.fileno(), row.tobytes(), number * row.nbytes)
            except OSError as error:
                raise OSError(error.errno, f"could not keep the teacher's answers ({error.strerror})", path) from error
            if written < row.nbytes:
                raise OSError(errno.ENOSPC, "could not keep the teacher's answers (the disk is full)", path)


def _checksums(rows: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Of each row; never 0, which means absent."""
    return np.array([zlib.crc32(row.tobytes()) or 1 for row in rows], np.uint32)


def _about(objective: Objective, feed: Feed, settings: Settings) -> dict[str, Any]:
    """Everything that an answer depends on."""
    data, teacher = feed.data, objective.networks.network("teacher")
    return {
        "format": 1,
        "teacher": digest_of(teacher.state_dict(), str(teacher)),
        "pictures": data.train.digest(),
        "normalisation": asdict(feed.normalisation),
        "augment": asdict(data.augment),
        "seed": settings.seed if feed.moves else None,
        "computed": [str(feed.device), _precision(settings), settings.compile, str(feed.memory_format)],
        "torch": torch.__version__,
    }


def _precision(settings: Settings) -> str:
    """Of the teacher."""
    return settings.precision if settings.teacher_precision == "same" else settings.teacher_precision
