"""OpenVINO computes what was trained, with every quantizer, width and layer kind, on integer or XNOR kernels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.deploy import Exported, LayerRow, ParityError, accuracy, bench, export
from fewbits.deploy.openvino_runtime import Compiled

openvino = pytest.importorskip("openvino")

BATCH = 24


class Network(nn.Module):
    """Stem, one layer under test with batch norm, an addition, a head."""

    def __init__(self, layer: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.layer = layer
        outputs = layer.out_channels
        is_same_size = layer.stride == (1, 1) and 2 * layer.padding[0] == layer.dilation[0] * (layer.kernel_size[0] - 1)
        self.adds = is_same_size and outputs == channels
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(outputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.norm2(self.layer(x))
        if self.adds:
            y = y + x
        return self.head(self.flatten(self.pool(self.relu2(y))))


def images(size: int = 12) -> Tensor:
    return torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))


def student(layer: nn.Conv2d, channels: int, weights: int, activations: int, quantizer: str | None = None) -> nn.Module:
    """A network with batch norms of both signs that has seen data."""
    torch.manual_seed(0)
    model = Network(layer, channels)
    for norm in (model.norm, model.norm2):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
    made = fb.quantize(model, weights, activations, quantizer=quantizer)
    fb.calibrate(made, [images()])
    made.train()
    with torch.no_grad():
        for _ in range(30):
            made(images())
    return made.eval()


def ship(model: nn.Module, folder: Path, suffix: str = ".xml") -> Exported:
    return export(model, folder / f"s{suffix}", example=images(), normalisation=None, engine="openvino")


def layer_row(found: Exported) -> LayerRow:
    return next(row for row in found.layers if row.name == "layer")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("quantizer", ["lsq", "ewgs", "pact", "dorefa", "minmax-frozen"])
def test_quantizers(quantizer: str, bits: int, tmp_path: Path):
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    found = ship(student(layer, 8, bits, bits, quantizer), tmp_path, ".onnx")
    rows = {row.name: row for row in found.layers}
    is_float = "float offset" in rows["layer"].reason or "do not fit" in rows["layer"].reason
    assert is_float or rows["layer"].kernel.lower().endswith("_i8"), rows["layer"]


LAYERS = {
    "strided": nn.Conv2d(8, 16, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
    "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
    "pointwise": nn.Conv2d(8, 12, 1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [2, 8])
def test_layers(name: str, bits: int, tmp_path: Path):
    found = ship(student(LAYERS[name], 8, bits, bits), tmp_path, ".onnx")
    assert all(row.kernel.lower().endswith("_i8") for row in found.layers if row.name == "layer"), found.layers


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("quantizer", ["sign", "xnor", "bireal", "react"])
def test_binary_convolutions_run_on_the_xnor_kernel(quantizer: str, channels: int, tmp_path: Path):
    # Behind a ReLU half of the values are exactly zero: ties.
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    model = student(layer, channels, 1, 1, quantizer)
    if quantizer == "react":
        nn.init.uniform_(model.layer.input_quantizer.shift, -0.5, 0.5)
    found = ship(model, tmp_path)
    row = next(row for row in found.layers if row.name == "layer")
    assert row.kernel == "BinaryConvolution jit_avx512_u1" or row.kernel.endswith("_u1"), row
    assert row.reason == ""
    code = next(row for row in found.codes if row.name.endswith("layer.input_quantizer"))
    assert code.equal > 0.999


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("padding", [0, 1])
def test_binary_shapes(kernel: int, stride: int, padding: int, tmp_path: Path):
    layer = nn.Conv2d(24, 10, kernel, stride=stride, padding=padding)
    found = ship(student(layer, 24, 1, 1, "bireal"), tmp_path)
    assert next(row for row in found.layers if row.name == "layer").kernel.endswith("_u1")


def test_what_the_xnor_kernel_cannot_do_says_why(tmp_path: Path):
    grouped = ship(student(nn.Conv2d(16, 16, 3, padding=1, groups=2), 16, 1, 1, "bireal"), tmp_path)
    odd = ship(student(nn.Conv2d(9, 9, 3, padding=1), 9, 1, 1, "bireal"), tmp_path)
    assert "no groups" in layer_row(grouped).note
    assert "multiples of 8 input channels, and this layer has 9" in layer_row(odd).note
    for found in (grouped, odd):
        assert not layer_row(found).kernel.endswith("_u1")


def test_file_is_read_by_a_bare_openvino(tmp_path: Path):
    model = student(nn.Conv2d(16, 16, 3, padding=1, bias=False), 16, 1, 1, "react")
    found = ship(model, tmp_path)
    graph = openvino.Core().read_model(found.path)
    graph.reshape([7, 3, 12, 12])
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    x = images()[:7]
    got = openvino.Core().compile_model(graph, "CPU", options)(x.numpy())[0]
    with torch.no_grad():
        wanted = model(x).numpy()
    assert (got.argmax(1) == wanted.argmax(1)).all()
    assert graph.get_rt_info(["fewbits", "engine"]).astype(str) == "openvino"


def test_wrong_values_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A threshold above zero instead of just below it: every zero gets the other sign.
    monkeypatch.setattr("fewbits.deploy.xnor.np.nextafter", lambda threshold, _: np.asarray(threshold) + 1e-6)
    model = student(nn.Conv2d(16, 16, 3, padding=1, bias=False), 16, 1, 1, "bireal")
    with pytest.raises(ParityError, match=r"layer\.input_quantizer"):
        ship(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_suffixes(tmp_path: Path):
    model = student(nn.Conv2d(16, 16, 3, padding=1, bias=False), 16, 1, 1, "bireal")
    with pytest.raises(ValueError, match=r"must end in \.xml for a network with binary"):
        ship(model, tmp_path, ".onnx")
    with pytest.raises(ValueError, match=r"\.xml or \.onnx for engine 'openvino', got 's\.bin'"):
        ship(model, tmp_path, ".bin")
    assert not list(tmp_path.iterdir())


def test_packed_files_are_small_and_measured(tmp_path: Path):
    found = ship(student(nn.Conv2d(64, 64, 3, padding=1, bias=False), 64, 2, 2), tmp_path, ".onnx")
    assert found.size_bytes < 1.05 * found.theoretical_bytes + 500 * len(found.layers) + 4000
    rows = bench({"student": found.path}, images(), batch_sizes=[1, 3], repeats=3)
    assert [row.size_bytes for row in rows] == [found.size_bytes] * 2
    labels = torch.zeros(BATCH, dtype=torch.long)
    assert 0 <= accuracy(found.path, [(images(), labels)]) <= 1


def test_foreign_and_damaged_files_are_errors(tmp_path: Path):
    found = ship(student(nn.Conv2d(16, 16, 3, padding=1, bias=False), 16, 1, 1, "bireal"), tmp_path)
    weights = found.path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="OpenVINO cannot load or run"):
        bench({"student": found.path}, images(), batch_sizes=[1], repeats=1)
    (tmp_path / "x.xml").write_text("<net/>")
    with pytest.raises(ValueError, match=r"has no weights|cannot load or run x\.xml"):
        bench({"student": tmp_path / "x.xml"}, images(), batch_sizes=[1], repeats=1)


def test_padding_of_another_kind_says_what_it_costs(tmp_path: Path):
    reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", bias=False)
    row = layer_row(ship(student(reflect, 16, 2, 2), tmp_path, ".onnx"))
    assert row.kernel.lower().endswith("_i8")
    assert row.reason == ""
    row = layer_row(ship(student(reflect, 16, 1, 1, "react"), tmp_path))
    assert row.kernel.lower().endswith("_i8")
    assert "padded" in row.note
    circular = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)
    with pytest.raises(ValueError, match="OpenVINO's own converter cannot follow"):
        ship(student(circular, 16, 2, 2), tmp_path, ".onnx")


def test_files_of_others_are_named(tmp_path: Path):
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 3, 12, 12], np.float32, name="x")
    openvino.save_model(openvino.Model([ops.relu(x)], [x], "foreign"), tmp_path / "foreign.xml")
    with pytest.raises(ValueError, match=r"foreign\.xml has an input"):
        bench({"student": tmp_path / "foreign.xml"}, images(), batch_sizes=[1], repeats=1)
    found = ship(student(nn.Conv2d(16, 16, 3, padding=1, bias=False), 16, 1, 1, "bireal"), tmp_path)
    with pytest.raises(ValueError, match=r"cannot load or run s\.xml"):
        accuracy(found.path, [(images(12)[:, :1], torch.zeros(BATCH))])
    found.path.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=r"s\.bin has to lie beside it"):
        bench({"student": found.path}, images(), batch_sizes=[1], repeats=1)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"exported files end in \.onnx or \.xml"):
        bench({"student": tmp_path / "x.txt"}, images(), batch_sizes=[1], repeats=1)


def test_slim_text_is_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = student(nn.Conv2d(16, 16, 3, padding=1, bias=False), 16, 1, 1, "bireal")
    (tmp_path / "slim").mkdir()
    slim = ship(model, tmp_path / "slim")
    monkeypatch.setattr("fewbits.deploy.openvino_runtime.slim", lambda xml: xml)
    whole = ship(model, tmp_path)
    assert slim.size_bytes < 0.8 * whole.size_bytes
    x = images()[:3].numpy()
    results = [Compiled(found.path).run({"images": x})["logits"] for found in (slim, whole)]
    np.testing.assert_array_equal(*results)


CONCATENATION = """
import sys
import torch
from torch import nn
from torch.nn import functional as F

import fewbits as fb


class Network(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 16, 1)
        self.between, self.c, self.fc = between, nn.Conv2d(56, 30, 3, padding=1), nn.Linear(30, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.c(self.between(torch.cat([x, self.b(x)], 1)))
        return self.fc(x.mean((2, 3)))


torch.manual_seed(0)
images = torch.rand(16, 3, 8, 8)
for name in sys.argv[2:]:
    kinds = {"nothing": nn.Identity(), "relu": nn.ReLU(), "clip": nn.Hardtanh()}
    between = kinds | {"norm": nn.BatchNorm2d(56), "pool": nn.MaxPool2d(2)}
    network = Network(between[name]).train()
    network(images)
    quantizer = "sign" if name != "nothing" else "lsq"
    student = fb.quantize(network.eval(), 1, 1, quantizer=quantizer, residual=None)
    fb.calibrate(student, [images])
    student.eval()
    found = fb.export(student, sys.argv[1], example=images, normalisation=None, engine="openvino", minimum_equal=0.9)
    row = next(row for row in found.layers if row.name == "c")
    print(f"{name}: {row.kernel.split()[0]}: {row.note}")
"""


def test_signs_behind_a_concatenation_do_not_kill_the_process(tmp_path: Path):
    """Found: OpenVINO puts the sign in front of the concatenation, and dies or computes noise."""
    (tmp_path / "script.py").write_text(CONCATENATION)
    arguments = [tmp_path / "script.py", tmp_path / "student.xml", "relu", "clip", "norm", "nothing", "pool"]
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    relu, clip, norm, nothing, pool = done.stdout.splitlines()
    why = "OpenVINO moves signs in front of a concatenation, and the kernel then reads memory that is not its own"
    assert relu == f"relu: Convolution: {why}"
    assert clip == f"clip: Convolution: {why}"
    assert norm == f"norm: Convolution: {why}"
    assert nothing.startswith("nothing: Convolution")
    assert pool == "pool: BinaryConvolution: "


SIGNALS = """
import faulthandler, signal, subprocess, sys
from pathlib import Path
import numpy as np
from fewbits.deploy.openvino_runtime import Compiled

faulthandler.enable()  # a stack for signals, as pytest and many services have one
signal.signal(signal.SIGCHLD, lambda *_: None)  # as PyTorch's data loader does
feeds = {"x": np.ones((1, 3), np.float32)}
first, second = Compiled(Path(sys.argv[1])), Compiled(Path(sys.argv[1]))
for network in (first, second):
    network.run(feeds)
del network, first
del second
subprocess.run(["true"])
print("alive")
"""


def test_signals_arrive_after_networks_are_gone(tmp_path: Path):
    """Found: with a core of its own for each network, the next child process of a process ended that process."""
    x = openvino.opset13.parameter([1, 3], np.float32, name="x")
    x.output(0).set_names({"x"})
    openvino.save_model(openvino.Model([openvino.opset13.relu(x)], [x], "relu"), tmp_path / "relu.xml")
    arguments = [sys.executable, "-c", SIGNALS, str(tmp_path / "relu.xml")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "alive\n"
