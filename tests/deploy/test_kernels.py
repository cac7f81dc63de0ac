"""Kernels are chosen by times that were measured on this machine, and each gives the trained codes."""

import itertools
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits as fb
from fewbits.commands import kernels as command
from fewbits.commands.ship import default_name
from fewbits.deploy import choosing, export, kernels, layer_times, measure_kernels, prove, seal
from fewbits.deploy.candidates import Candidates, candidates
from fewbits.deploy.engines import ENGINES
from fewbits.deploy.kernels import FASTER, PREFERENCE, Choice, choose
from fewbits.deploy.prepare import prepare
from fewbits.layers import QuantConv2d
from fewbits.quantizers import QuantSpec

from .test_openvino import images, layer_row, student

pytest.importorskip("openvino")

HERE = kernels.machine("openvino", 1)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    return kernels.table_path()


# The choice


times_of = st.dictionaries(st.sampled_from(PREFERENCE), st.floats(1e-3, 10))


@given(st.sets(st.sampled_from(PREFERENCE), min_size=1), st.dictionaries(st.sampled_from("abc"), times_of))
def test_choice_is_the_fastest_or_the_first(kinds, times):
    shapes = list(times) or ["a"]
    found = choose(sorted(kinds), shapes, times)
    first = next(kind for kind in ("xnor", "int8", "float", "planes") if kind in kinds)
    if len(kinds) == 1:
        assert found == Choice(first, "the only way")
        return
    if not all(kind in times.get(shape, {}) for shape in shapes for kind in kinds):
        assert found == Choice(first, "default: not measured")
        return
    sums = {kind: sum(times[shape][kind] for shape in shapes) for kind in kinds}
    least = min(sums.values())
    if found.kind == first:
        assert sums[first] - least <= max(0.05 * sums[first], 0.005)
    else:
        assert sums[found.kind] == least < sums[first]
    assert all(f"{kind} {sums[kind]:.3f} ms" in found.why for kind in kinds)


def test_without_times_planes_are_never_chosen():
    for size in range(2, 5):
        for kinds in itertools.combinations(PREFERENCE, size):
            assert choose(kinds, ["a"], {}).kind != "planes"
            assert choose(kinds, [], {"a": dict.fromkeys(kinds, 1.0)}).why == "default: not measured"


# The table


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(kernels, "version", absent)
    with pytest.raises(ImportError, match=r'openvino, which is not installed; pip install "fewbits\[openvino\]"'):
        kernels.machine("openvino", 1)


def test_times_are_kept_by_machine_and_shape(table: Path):
    kernels.store(table, "here", {"a": {"int8": 1.0}, "b": {"int8": 2.0}})
    kernels.store(table, "there", {"a": {"int8": 3.0}})
    kernels.store(table, "here", {"b": {"float": 4.0}})
    assert kernels.read(table, "here") == {"a": {"int8": 1.0}, "b": {"float": 4.0}}
    assert kernels.read(table, "there") == {"a": {"int8": 3.0}}
    assert kernels.read(table, "nowhere") == {}
    assert [path.name for path in table.parent.iterdir()] == ["kernels.json"]
    assert len({kernels.machine("openvino", 1), kernels.machine("openvino", 2), kernels.machine("onnxruntime", 1)}) == 3


GOOD = {"format": 1, "machines": {HERE: {"a": {"int8": 1.0}}}}
DAMAGED = [
    "{",
    "[]",
    b"\xff\xfe\x00".decode("latin-1"),
    json.dumps(GOOD | {"format": 2}),
    json.dumps(GOOD | {"machines": []}),
    json.dumps(GOOD | {"machines": {HERE: {"a": 1.0}}}),
    json.dumps(GOOD | {"machines": {HERE: {"a": {"int9": 1.0}}}}),
    json.dumps(GOOD | {"machines": {HERE: {"a": {"int8": -1.0}}}}),
    json.dumps(GOOD | {"machines": {HERE: {"a": {"int8": float("nan")}}}}),
    json.dumps(GOOD | {"machines": {HERE: {"a": {"int8": "fast"}}}}),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_table_is_named_left_aside_and_replaced(content: str, table: Path):
    table.parent.mkdir()
    table.write_text(content, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"kernels\.json is damaged .* measure again with fewbits bench RUN --kernels"):
        assert kernels.read(table, HERE) == {}
    kernels.store(table, HERE, GOOD["machines"][HERE])
    assert kernels.read(table, HERE) == GOOD["machines"][HERE]


# Networks


@pytest.fixture(scope="module")
def students() -> dict[str, nn.Module]:
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    widths = {"1/1": (1, 1, "react"), "1/2": (1, 2, "lsq"), "4/4": (4, 4, "lsq")}
    return {name: student(layer, 16, *width) for name, width in widths.items()}


def fill(table: Path, model: nn.Module, fastest: str, layers: tuple[str, ...] = ("layer",)) -> None:
    """A table in which ``fastest`` is the fastest for ``layers``, and int8 for the others."""
    network, traced, _, _ = prepare(model, images(), None)
    times = {}
    for name, ways in candidates(traced, network).items():
        for shape in ways.shapes:
            first = fastest if name in layers else "int8"
            times[shape] = {kind: 1.0 if kind == first else 2.0 for kind in ways.kinds}
    kernels.store(table, HERE, times)


ENDS = {"xnor": "_u1", "planes": "_u1", "int8": "_i8", "float": "_f32"}


@pytest.mark.parametrize(
    ("widths", "kind"),
    [
        *[("1/1", "xnor"), ("1/1", "int8"), ("1/1", "float")],
        *[("1/2", "planes"), ("1/2", "int8"), ("1/2", "float")],
        *[("4/4", "int8"), ("4/4", "float")],
    ],
)
def test_the_fastest_kernel_is_the_one_that_runs(widths, kind, students, table: Path, tmp_path: Path):
    model = students[widths]
    fill(table, model, kind)
    made = export(model, tmp_path / "s.xml", example=images(), normalisation=None, engine="openvino")
    row = layer_row(made)
    assert row.kernel.lower().endswith(ENDS[kind])
    assert row.kernel.startswith("3 x ") == (kind == "planes")
    assert row.choice.startswith(f"measured: {kind} 1.000 ms, ")
    assert row.reason == (FASTER if kind == "float" else "")
    assert [other.reason for other in made.layers if other.name != "layer"] == ["", ""]
    assert min(code.equal for code in made.codes) == 1.0
    assert made.equal_predictions == 1.0
    # The proof builds the file again, from what it says of its kernels and not from a table that may have changed.
    table.unlink()
    assert prove(model, made.path, example=images(), normalisation=None).codes[:-1] == made.codes[:-1]


def test_linear_layers_in_float(students, table: Path, tmp_path: Path):
    fill(table, students["4/4"], "float", ("head", "stem"))
    made = export(students["4/4"], tmp_path / "s.onnx", example=images(), normalisation=None, engine="openvino")
    assert {row.name: row.reason for row in made.layers} == {"stem": FASTER, "layer": "", "head": FASTER}
    assert not any(row.kernel.lower().endswith("_i8") for row in made.layers if row.name != "layer")


def test_without_the_table_of_this_machine_the_rule_holds(students, table: Path, tmp_path: Path):
    def exported(name: str, how: str = "table") -> bytes:
        made = export(
            students["1/2"], tmp_path / name, example=images(), normalisation=None, engine="openvino", kernels=how
        )
        assert {row.choice for row in made.layers} == {"default: not measured"}
        assert all(row.kernel.lower().endswith("_i8") for row in made.layers)
        return made.path.read_bytes()

    plain = exported("a.onnx")
    fill(table, students["1/2"], "planes")
    content = table.read_text()
    table.write_text(content.replace(HERE, HERE.replace("threads 1", "threads 64")))
    assert exported("b.onnx") == plain
    table.write_text(content)
    assert exported("c.onnx", "default") == plain
    table.write_text("damaged")
    with pytest.warns(UserWarning, match="kernels are chosen as if nothing was measured"):
        assert exported("d.onnx") == plain


def test_planes_are_for_files_that_have_words_for_them(students, table: Path, tmp_path: Path):
    assert not kernels.planes_win("openvino", 1)
    fill(table, students["1/2"], "int8")
    assert not kernels.planes_win("openvino", 1)
    fill(table, students["1/2"], "planes")
    assert kernels.planes_win("openvino", 1)
    assert not kernels.planes_win("openvino", 2)
    plan = fb.Plan(1, 2)
    assert default_name("openvino", plan) == "student-openvino.onnx"
    assert default_name("openvino", plan, has_planes=True) == "student-openvino.xml"
    assert default_name("openvino", fb.Plan(2, 2), has_planes=True) == "student-openvino.onnx"
    made = export(students["1/2"], tmp_path / "s.onnx", example=images(), normalisation=None, engine="openvino")
    assert layer_row(made).choice == "measured: int8 2.000 ms, float 2.000 ms"


def test_candidates_are_what_gives_the_same_codes():
    def layer(inputs: int, outputs: int, weights: str, activations: str, **options: int) -> QuantConv2d:
        specs = [text.split("-") for text in (weights, activations)]
        weight, activation = (
            QuantSpec(method, int(bits), role)
            for (method, bits), role in zip(specs, ("weight", "activation"), strict=True)
        )
        return QuantConv2d.from_float(nn.Conv2d(inputs, outputs, 3, padding=1, **options), weight, activation)

    network = nn.Sequential(
        layer(16, 16, "lsq-1", "lsq-2"),
        layer(16, 16, "lsq-1", "lsq-3"),
        layer(16, 16, "lsq-2", "lsq-2"),
        layer(16, 16, "dorefa-8", "lsq-8"),
        layer(16, 9, "bireal-1", "bireal-1"),
        layer(9, 16, "lsq-1", "lsq-2"),
        layer(16, 16, "lsq-1", "ewgs-2", groups=2),
        layer(16, 16, "dorefa-1", "minmax-2"),
        layer(16, 16, "ewgs-1", "ewgs-2", padding_mode="reflect"),
    )
    x = torch.rand(2, 16, 8, 8)
    fb.calibrate(network, [x])
    prepared, traced, _, _ = prepare(network.eval(), x, None)
    assert [ways.kinds for ways in candidates(traced, prepared).values()] == [
        ("planes", "int8", "float"),
        ("int8", "float"),
        ("int8", "float"),
        ("float",),
        ("xnor", "int8", "float"),
        ("int8", "float"),
        ("int8", "float"),
        ("float",),
        ("int8", "float"),
    ]


@pytest.mark.filterwarnings("ignore:times of")  # a test machine may be busy
def test_measured_times_are_kept_and_chosen_by(students, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choosing, "REPEATS", 3)
    model = students["1/2"]
    arguments = {"example": images(), "normalisation": None, "engine": "openvino"}
    made = export(model, tmp_path / "s.xml", kernels="measure", **arguments)
    times = kernels.read(table, HERE)
    assert sorted(map(sorted, times.values())) == [["float", "int8"], ["float", "int8"], ["float", "int8", "planes"]]
    assert all(ms > 0 for row in times.values() for ms in row.values())
    again = export(model, tmp_path / "t.xml", **arguments)
    assert again.layers == made.layers
    assert all(row.choice.startswith("measured: ") for row in made.layers)


def test_unsteady_times_are_said(monkeypatch: pytest.MonkeyPatch):
    turns = {"int8": [1.0, 1.6, 1.1], "float": [2.0, 2.1, 2.2]}
    monkeypatch.setattr(layer_times, "alone", lambda node: None)
    monkeypatch.setattr(layer_times, "_opened", lambda *arguments: None)
    monkeypatch.setattr(layer_times, "_interleaved", lambda runs, repeats: turns)
    found = {"layer": Candidates(("int8", "float"), (None,), ("a",))}
    with pytest.warns(UserWarning, match="times of 1 of 1 layers are unsteady"):
        times = layer_times.measure(found, None, threads=1, repeats=3)
    assert times == {"a": {"int8": 1.0, "float": 2.0}}


def test_arguments(students, tmp_path: Path):
    arguments = {"example": images(), "normalisation": None, "engine": "openvino"}
    with pytest.raises(ValueError, match="kernels must be one of table, measure, default, got 'fastest'"):
        export(students["4/4"], tmp_path / "s.onnx", kernels="fastest", **arguments)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        export(students["4/4"], tmp_path / "s.onnx", threads=0, **arguments)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_kernels(students["4/4"], example=images(), normalisation=None, repeats=0)
    with pytest.raises(ValueError, match="no layer has a choice of kernels"):
        measure_kernels(students["4/4"], example=images(), normalisation=None, engine="onnxruntime")
    assert not list(tmp_path.iterdir())


def test_a_file_that_asks_for_an_impossible_kernel_is_refused(students, table: Path, tmp_path: Path):
    fill(table, students["4/4"], "float")
    made = export(students["4/4"], tmp_path / "s.xml", example=images(), normalisation=None, engine="openvino")
    text = made.path.read_text()
    assert "float&quot;" in text
    changed = text.replace("float&quot;", "planes&quot;")
    made.path.write_text(changed)
    with pytest.raises(ValueError, match="or is damaged; export again"):
        prove(students["4/4"], made.path, example=images(), normalisation=None)
    # A version that gave the layer this kernel would have sealed it.
    metadata = ENGINES["openvino"].metadata(made.path)
    again = seal.sealed(metadata, seal.digest(students["4/4"], None))
    made.path.write_text(changed.replace(metadata[seal.SEAL], again[seal.SEAL]))
    with pytest.raises(ValueError, match="'layer' has the kernel 'planes', and here it can have int8, float"):
        prove(students["4/4"], made.path, example=images(), normalisation=None)


@pytest.mark.filterwarnings("ignore:times of")
def test_bench_measures_and_export_explains(students, table: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    class Data:
        def pixels(self, count: int) -> torch.Tensor:
            return images()[:count]

    students["1/2"].fewbits_normalisation = None
    monkeypatch.setattr(command, "load_run", lambda run: (students["1/2"], None))
    monkeypatch.setattr(command, "run_data", lambda run, root: Data())
    rows = command.measure(Path("run"), [1, 2], 3, None)
    assert {row["threads"] for row in rows} == {1, 2}
    assert len(kernels.read(table, kernels.machine("openvino", 2))) == 3
    assert "planes" in capsys.readouterr().out
    layer = {"kernel": "k", "choice": "measured: a"}
    said = command.explained([layer | {"name": "x"}, layer | {"name": "y"}, {"name": "z", "kernel": "k", "choice": ""}])
    assert said == ["x, y: k; measured: a"]
