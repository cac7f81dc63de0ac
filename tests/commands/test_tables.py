"""Tables in narrow terminals: no line is too long, no number is broken, and what was left out is said."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

import fewbits as fb
from fewbits.commands.show import SPARE
from fewbits.commands.tables import print_table
from fewbits.report import DISPENSABLE, comparison


def printed(width: int, table: Table, **rest: tuple[str, ...]) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_table(console, table, **rest)
    text = console.file.getvalue()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def summary() -> Table:
    student = fb.quantize(fb.models.build("resnet20", num_classes=10), 2, 2, keep=["layer3.*"])
    return fb.summarize(student.eval(), torch.zeros(1, 3, 32, 32)).table()


def test_a_wide_terminal_shows_everything():
    text = printed(250, summary(), spare=SPARE, wraps=("remarks",))
    assert all(heading in text for heading in SPARE)
    assert "left out" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_summary_leaves_columns_out(width: int):
    text = printed(width, summary(), spare=SPARE, wraps=("remarks",))
    for whole in ("layer1.0.conv1", "8 lsq unsigned", "1,084,392") if width >= 80 else ("1,084,392",):
        assert whole in text
    left_out = " ".join(text.split("left out at ")[1].split()).split(": ")[1].split("; ")
    assert left_out == list(SPARE[: len(left_out)])
    assert ("kept by the" in text) == (width >= 80)
    if width == 80:
        rows = [line for line in text.splitlines() if "layer1" in line]
        assert len(rows) == 6 + 6  # layers and streams, one line each


def test_columns_are_left_out_in_order_and_only_as_needed():
    table = Table("name", "first", "second")
    table.add_row("n" * 20, "f" * 20, "s" * 20)
    wide = printed(70, table, spare=("first", "second"))
    assert "left out" not in wide
    narrow = printed(69, table, spare=("first", "second"))
    assert "left out at 69 columns: first" in narrow
    assert "s" * 20 in narrow


def test_headings_fold_before_columns_go():
    table = Table("name", "a heading of words")
    table.add_row("n" * 20, "1.0")
    text = printed(36, table, spare=("a heading of words",))
    assert "left out" not in text
    assert "n" * 20 in text


def finished_run(folder: Path) -> Path:
    """What reports read of a run that was exported and measured."""
    folder.mkdir()
    made_by = {
        "model": "resnet20",
        "data": {"name": "cifar10"},
        "plan": {"weights": 2, "activations": 2, "quantizer": "lsq"},
        "recipe": {"name": "plain"},
    }
    end = {"event": "end", "phase": "student", "step": 9, "epoch": 3, "accuracy": 0.8716, "best_accuracy": 0.8728}
    export = {"size_bytes": 89_827, "ratio": 12.03, "accuracy_engine": 0.8703, "max_difference": 0.5}
    rows = [
        {"name": name, "batch_size": 1, "threads": 1, "latency_ms": latency, "ratio": 1.0}
        for name, latency in (("float", 0.478), ("student", 0.257))
    ]
    (folder / "run.json").write_text(json.dumps(made_by))
    (folder / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    (folder / "export.json").write_text(json.dumps(export | {"equal_predictions": 1.0}))
    (folder / "bench.json").write_text(json.dumps({"rows": rows}))
    return folder


def test_the_comparison_fits_eighty_columns(tmp_path: Path):
    runs = [finished_run(tmp_path / "resnet20-cifar10-plain-w2a2-s0"), finished_run(tmp_path / "b")]
    text = printed(80, comparison(runs), spare=DISPENSABLE)
    for whole in ("resnet20-cifar10-plain-w2a2-s0", "87.16", "89.8", "12.0"):
        assert whole in text
