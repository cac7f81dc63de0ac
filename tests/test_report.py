import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from fewbits.convert import quantize
from fewbits.data import load
from fewbits.recipes import QFD, RECIPES, Float
from fewbits.report import comparison, report
from fewbits.report.figures import figures
from fewbits.report.runs import read_runs
from fewbits.report.sections import reconstruction
from fewbits.summary import summarize
from fewbits.training import fit

FIGURES = {"accuracy", "losses", "size", "latency", "layers"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float run, and a 2-bit one taught by it: really trained, for a moment."""
    root = tmp_path_factory.mktemp("runs")
    digits = load("digits")
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    settings = {"data": digits, "progress": False, "tensorboard": False, "batch_size": 128, "bn_batches": 2}
    fit(teacher, recipe=Float(), output=root / "float", epochs=2, lr=0.1, **settings)
    student = quantize(teacher, 2, 2)
    result = fit(student, teacher, recipe=QFD(share=0.5), output=root / "two <b>bits", epochs=2, ema=0.9, **settings)
    summary = summarize(result.student, torch.zeros(1, 1, 8, 8))
    taught = root / "two <b>bits"
    (taught / "summary.json").write_text(json.dumps(summary.to_data()))
    (taught / "export.json").write_text(json.dumps(EXPORT))
    (taught / "bench.json").write_text(json.dumps(BENCH))
    return root / "float", taught


EXPORT = {
    "engine": "onnxruntime",
    "file": "student.onnx",
    "size_bytes": 2500,
    "theoretical_bytes": 1500,
    "float_bytes": 10_000,
    "ratio": 4.0,
    "max_difference": 1.5e-5,
    "equal_predictions": 0.9975,
    "accuracy_pytorch": 0.5,
    "accuracy_engine": 0.5125,
    "layers": [{"name": "3", "bits": 2, "kernel": "QLinearConv", "reason": "as <it> should"}],
}
BENCH = {
    "rows": [
        {"name": name, "batch_size": size, "threads": 1, "latency_ms": latency, "ratio": 1.0, "size_bytes": 1}
        for name, size, latency in (("float", 64, 8.0), ("student", 64, 3.0), ("float", 1, 0.5), ("student", 1, 0.125))
    ]
}


class Page(HTMLParser):
    """What a browser would see: texts outside of scripts, addresses, nesting."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, dict] = {}
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            key = self.tags[-1][1].get("data-figure")
            if key:
                self.figures[key.removeprefix("figure-")] = json.loads(data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def run_folder(path: Path, records: list[dict], **made_by: object) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"format": 1, **made_by}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def printed(folders: list[Path]) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(comparison(folders))
    return console.export_text()


def line_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(name)]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_trained_run_on_a_page(trained: tuple[Path, Path], tmp_path: Path):
    output = report(trained, tmp_path / "page.html")
    page = Page(output.read_text())
    assert set(page.figures) == FIGURES
    name = "two <b>bits"
    assert name in page.text
    assert "Reconstruction: the quantizer" in page.text
    assert "the average of its weights (EMA) reaches" in page.text
    assert "recipe.terms.2.is" in page.text
    assert "as <it> should" in page.text
    assert "0.250" not in page.text
    assert {"0.125 (batch 1)", "0.25", "2.5", "4.0", "99.75", "51.25", "2/2", "32/32"} <= set(page.texts)


def test_the_page_is_one_file_without_network(trained: tuple[Path, Path], tmp_path: Path):
    content = report(trained, tmp_path / "page.html").read_text()
    page = Page(content)
    assert not [attrs for _, attrs in page.tags if {"src", "href", "action"} & attrs.keys()]
    assert "<link" not in content
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert content.count("plotly.js v") == 1


def test_equal_folders_give_equal_pages(trained: tuple[Path, Path], tmp_path: Path):
    first, second = (report(trained, tmp_path / f"{n}.html").read_bytes() for n in (1, 2))
    assert first == second


def test_nothing_of_a_run_becomes_markup(tmp_path: Path):
    attack = "</script><img src=x onerror=alert(1)>"
    records = [
        {"event": "train", "step": 1, "epoch": 0.1, "phase": attack, "loss": 1.0, f"loss/{attack}": 1.0, "loss/b": 2.0},
        {"event": "evaluation", "step": 1, "epoch": 0.1, "phase": attack, "accuracy": 0.5},
    ]
    folder = run_folder(tmp_path / "<img src=x>", records, model=attack, recipe={"name": attack}, data={"name": attack})
    summary = summarize(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8)).to_data()
    summary["rows"][0]["name"] = summary["rows"][0]["reason"] = attack
    (folder / "summary.json").write_text(json.dumps(summary))
    row = {"name": attack, "batch_size": attack and 1, "threads": 1, "latency_ms": 1.0}
    (folder / "bench.json").write_text(json.dumps({"rows": [row]}))
    page = Page(report([folder], tmp_path / "page.html").read_text())
    assert "img" not in [tag for tag, _ in page.tags]
    # Plotly draws a few tags in texts.
    assert "<img" not in json.dumps(page.figures)
    assert attack in page.text


def test_figures_are_what_plotly_understands(trained: tuple[Path, Path]):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in figures(read_runs(trained)):
        drawn = graph_objects.Figure(data=figure.traces, layout=figure.layout)
        assert drawn.layout.xaxis.title.text
        assert drawn.layout.yaxis.title.text
        assert drawn.layout.showlegend
        assert all(trace.name for trace in drawn.data)


def test_accuracy_of_the_teachers_phase_is_told_apart(trained: tuple[Path, Path]):
    (_, taught) = read_runs(trained)
    (accuracy, *_) = figures([taught])
    dashes = {trace["name"].split(": ")[1]: trace.get("line", {}).get("dash") for trace in accuracy.traces}
    assert dashes == {"teacher (accuracy of the teacher)": "dot", "student": "solid", "final": None}
    assert len(accuracy.layout["shapes"]) == 1
    assert taught.end is not None
    assert taught.accuracy == taught.end["accuracy"]


def test_a_curve_of_the_loss_has_a_gap_between_phases(trained: tuple[Path, Path]):
    losses = next(f for f in figures(read_runs(trained)[1:]) if f.key == "losses")
    total = next(trace for trace in losses.traces if trace["name"].endswith("total"))
    assert total["y"].count(None) == 1


def test_headline_in_the_terminal(trained: tuple[Path, Path]):
    text = printed(list(trained))
    cells = line_of(text, "two <b>bits")
    assert cells[2:6] == ["digits", "qfd", "2/2", "lsq"]
    assert cells[8:] == ["onnxruntime", "51.25", "2.5", "4.0", "0.125 (batch 1)", "0.25", "99.75", "1.5e-05"]
    cells = line_of(text, "float")
    assert cells[3:6] == ["float", "32/32", "float"]
    assert cells[8:] == ["–"] * 8
    assert float(cells[6]) <= float(cells[7])


def test_a_run_that_goes_on(tmp_path: Path):
    records = [
        {"event": "evaluation", "step": 5, "epoch": 0.5, "phase": "teacher", "accuracy": 0.99},
        {"event": "evaluation", "step": 10, "epoch": 1.0, "phase": "student", "accuracy": 0.75},
        {"event": "evaluation", "step": 20, "epoch": 2.0, "phase": "student", "accuracy": 0.5},
    ]
    folder = run_folder(tmp_path / "run", records)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evalu')  # killed while it wrote
    assert line_of(printed([folder]), "run")[6:8] == ["50.00 (unfinished)", "75.00"]
    assert "not finished" in Page(report([folder], tmp_path / "page.html").read_text()).text


def test_a_run_without_anything(tmp_path: Path):
    folder = run_folder(tmp_path / "run", [])
    page = Page(report([folder], tmp_path / "page.html").read_text())
    assert page.figures == {}
    assert "run fewbits bench on it" in page.text
    assert "There is one run only." in page.text
    assert line_of(printed([folder]), "run")[6:] == ["–"] * 10


def test_a_run_that_was_exported_for_openvino_alone(tmp_path: Path):
    folder = run_folder(tmp_path / "run", [])
    (folder / "export-openvino.json").write_text(json.dumps(EXPORT | {"engine": "openvino"}))
    assert "openvino" in line_of(printed([folder]), "run")
    (folder / "export.json").write_text(json.dumps(EXPORT | {"engine": "onnxruntime"}))
    assert "onnxruntime" in line_of(printed([folder]), "run")


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path):
    records = [
        {"event": "train", "step": n, "epoch": n, "phase": "student", "loss": v} for n, v in enumerate((1.0, math.nan))
    ]
    records.append(
        {"event": "end", "step": 2, "epoch": 2, "phase": "student", "accuracy": math.nan, "skipped_steps": 1}
    )
    folder = run_folder(tmp_path / "run", records)
    (folder / "export.json").write_text('{"size_bytes": 100, "max_difference": NaN, "equal_predictions": NaN}')
    page = Page(report([folder], tmp_path / "page.html").read_text())
    assert page.figures["losses"]["data"][0]["y"] == [1.0]
    assert "1 steps were skipped" in page.text
    assert line_of(printed([folder]), "run")[6:] == ["–", "–", "–", "–", "0.1", *["–"] * 5]


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    folders = [run_folder(tmp_path / seed / "qfd", []) for seed in ("seed0", "seed1")]
    assert [run.name for run in read_runs(folders)] == ["seed0/qfd", "seed1/qfd"]
    with pytest.raises(ValueError, match="folders names a run twice"):
        read_runs([folders[0], folders[0]])


def test_settings_that_differ(tmp_path: Path):
    first = run_folder(tmp_path / "a", [], settings={"lr": 0.1, "seed": 7}, plan=None)
    second = run_folder(tmp_path / "b", [], settings={"lr": 0.2, "seed": 7}, plan={"keep": []})
    texts = Page(report([first, second], tmp_path / "page.html").read_text()).texts
    start = texts.index("settings.lr")
    assert texts[start : start + 3] == ["settings.lr", "0.1", "0.2"]
    assert "settings.seed" not in texts


def test_a_page_in_a_folder_that_is_missing(tmp_path: Path):
    """As export does: whoever mistypes a path does not want its folders."""
    run = run_folder(tmp_path / "a", [])
    with pytest.raises(ValueError, match=r"output must be in a folder that exists, got '.*nowhere/r\.html'"):
        report([run], tmp_path / "nowhere" / "r.html")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("make", [report, lambda folders, output: comparison(folders)])
def test_folders_that_are_no_runs(make, tmp_path: Path):
    output = tmp_path / "page.html"
    with pytest.raises(ValueError, match="folders is empty"):
        make([], output)
    with pytest.raises(ValueError, match="nowhere is no run folder: it does not exist"):
        make([tmp_path / "nowhere"], output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no run folder: run\.json is missing"):
        make([tmp_path / "empty"], output)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no run folder: not a folder"):
        make([tmp_path / "file"], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("metrics.jsonl", "{}\n{\n{}\n"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"event": "evaluation", "step": 1, "epoch": 1, "accuracy": "high"}\n'),
        ("metrics.jsonl", b"\xff\xfe\n"),
        ("export.json", "]"),
        ("export.json", '{"size_bytes": "large"}'),
        ("bench.json", '{"rows": 3}'),
        ("bench.json", '{"rows": [3]}'),
        ("bench.json", '{"rows": [{"latency_ms": true}]}'),
        ("summary.json", '{"rows": []}'),
        ("summary.json", '{"rows": [3], "totals": {}}'),
        ("summary.json", b"\xff"),
    ],
)
def test_damaged_files_are_named(file: str, content: str | bytes, tmp_path: Path):
    folder = run_folder(tmp_path / "run", [])
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(file)):
        report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_an_output_that_is_a_folder(tmp_path: Path):
    folder = run_folder(tmp_path / "run", [])
    with pytest.raises(ValueError, match="output must be a file"):
        report([folder], tmp_path)


def test_every_reconstruction_is_found():
    sources = {name: Path(str(RECIPES[name].__code__.co_filename)).read_text() for name in RECIPES}
    for name, source in sources.items():
        head = source.split('"""')[1]
        if "Reconstruction" in head:
            assert reconstruction(name).startswith("Reconstruction"), name
    assert reconstruction("qfd-rounded") == reconstruction("qfd")
    assert reconstruction("plain") == reconstruction("no such recipe") == ""
