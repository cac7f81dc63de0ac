"""What the file computes is what PyTorch computes: over methods, widths, layer kinds and batch norms of both signs."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fewbits.calibration as calibration
import fewbits.convert as convert
from fewbits.deploy import Exported, ParityError, export
from fewbits.deploy.sessions import kernels

from . import networks
from .networks import Concat, Plain, Residual, Tokens, Twice, cases, images, student

export_module = importlib.import_module("fewbits.deploy.export")
NORMALISATION = SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def logits(path: Path, x: torch.Tensor) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})[0])


def ship(model: nn.Module, folder: Path, **options: Any) -> Exported:
    return export(
        model, folder / "student.onnx", example=images(32), **{"normalisation": None, "minimum_equal": 0.0, **options}
    )


@pytest.mark.parametrize(("method", "bits"), cases())
def test_every_method_is_exported_equal(method: str, bits: int, tmp_path: Path):
    found = ship(student(Residual(), bits, bits, method), tmp_path)
    assert min(row.equal for row in found.codes) >= 0.999
    assert found.size_bytes == found.path.stat().st_size
    layers = {row.name: row for row in found.layers}
    assert list(layers) == ["stem", "conv1", "conv2", "head"]
    integer = {"QLinearConv", "QGemm"}
    assert all((row.kernel in integer) == (row.reason == "") for row in found.layers)
    if method == "lsq" and bits not in (1, 6, 7):
        # One bit has float shortcuts; at 6 and 7 bits little is left to shift, which tells in so small a network.
        assert [row.kernel for row in found.layers] == ["QLinearConv"] * 3 + ["QGemm"]


@pytest.mark.parametrize(("weights", "activations"), [(2, 8), (8, 2), (32, 4), (4, 32)])
def test_mixed_widths(weights: int, activations: int, tmp_path: Path):
    found = ship(student(Residual(), weights, activations, "lsq"), tmp_path)
    assert min(row.equal for row in found.codes) >= 0.999


def test_float_shortcuts_name_the_reason(tmp_path: Path):
    found = ship(student(Residual(), 4, 4, residual=None), tmp_path)
    by_name = {row.name: row for row in found.layers}
    assert "residual=8" in by_name["conv1"].reason
    assert by_name["conv1"].kernel != "QLinearConv"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param([nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU()], id="depthwise"),
        pytest.param([nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1)], id="grouped"),
        pytest.param([nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2), nn.ReLU()], id="strided"),
        pytest.param([nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()], id="reflected"),
        pytest.param([nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.ReLU()], id="signed"),
        pytest.param([nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AvgPool2d(2)], id="pooled"),
        pytest.param([nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)], id="batch norm first"),
        pytest.param([Twice()], id="shared"),
    ],
)
def test_layer_kinds(body: list[nn.Module], tmp_path: Path):
    found = ship(student(Plain(*body), 3, 4), tmp_path)
    assert min(row.equal for row in found.codes) >= 0.999


@pytest.mark.parametrize("residual", [8, None])
def test_concatenation(residual: int | None, tmp_path: Path):
    found = ship(student(Plain(Concat(), width=16), 4, 4, residual=residual), tmp_path)
    assert min(row.equal for row in found.codes) >= 0.999


def test_linear_layers_on_tokens(tmp_path: Path):
    found = ship(student(Tokens(), 4, 4, residual=None, ends=8), tmp_path)
    kernels = {row.name: row.kernel for row in found.layers}
    assert kernels["up"] == kernels["down"] == "MatMulIntegerToFloat"


def test_per_channel_steps(tmp_path: Path):
    found = ship(student(Residual(), 4, 4, granularity="channel"), tmp_path)
    assert [row.kernel for row in found.layers] == ["QLinearConv"] * 3 + ["QGemm"]


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_batch_norm_factors(method: str, tmp_path: Path):
    model = student(Residual(), 4, 4, method)
    with torch.no_grad():
        for name in ("bn", "bn1", "bn2"):
            model.get_submodule(name).weight[:5] = torch.tensor([0.0, -1.0, -1e-12, 1e-12, -1e-40])
    assert min(row.equal for row in ship(model, tmp_path).codes) >= 0.999


def test_eight_bit_weights_at_their_limits(tmp_path: Path):
    model = student(Residual(), 8, 8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.sign() * 100)
        for name in ("bn", "bn1", "bn2"):
            model.get_submodule(name).running_var.fill_(1e6)
            model.get_submodule(name).weight.mul_(-1)
    assert min(row.equal for row in ship(model, tmp_path).codes) >= 0.999


def test_ties_round_to_even_and_sign_of_zero_is_plus(tmp_path: Path):
    class Ties(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.sign = nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu(x - 0.5)
            return (self.conv(x) + self.sign(x)).mean((2, 3))

    rules = [convert.Rule("sign", 1, 1, "sign")]
    model = convert.quantize(Ties(), 4, 4, residual=None, rules=[convert.Rule("conv", 4, 4), *rules])
    x = torch.arange(17.0).div(16).repeat(2, 3, 4, 1)
    calibration.calibrate(model, [x])
    with torch.no_grad():
        model.conv.input_quantizer.step.fill_(0.125)
    found = export(model, tmp_path / "ties.onnx", example=x, normalisation=None, minimum_equal=0.0)
    assert {row.equal for row in found.codes} == {1.0}


def test_a_silu_stays_one_operator(tmp_path: Path):
    body = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    found = ship(student(Plain(*body), 4, 4), tmp_path)
    assert not [row for row in found.layers if row.reason]
    _, counted = kernels(found.path.read_bytes())
    assert counted["QuickGelu"] == 1
    assert counted["Sigmoid"] == 0


def test_any_batch_size_and_normalisation_inside(tmp_path: Path):
    model = student(Residual(), 2, 2)
    path = ship(model, tmp_path, normalisation=NORMALISATION).path
    for count in (1, 7):
        x = images(count)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (NORMALISATION.mean, NORMALISATION.std))
        with torch.no_grad():
            expected = model((x - mean) / std).numpy()
        found = logits(path, x)
        assert found.shape == (count, networks.CLASSES)
        np.testing.assert_allclose(found, expected, atol=0.2 * np.abs(expected).max())
    proto = onnx.load(path)
    assert [i.name for i in proto.graph.input] == ["images"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    onnx.checker.check_model(proto, full_check=True)
    # Nothing but the standard's operators and functions that the file itself spells out.
    assert {o.domain for o in proto.opset_import} == {""} | {f.domain for f in proto.functions}
    assert {node.domain for f in proto.functions for node in f.node} <= {""}


def test_the_same_student_gives_the_same_bytes(tmp_path: Path):
    model = student(Residual(), 2, 2)
    first = ship(model, tmp_path, class_names=["a", "b"]).path.read_bytes()
    assert ship(model, tmp_path, class_names=["a", "b"]).path.read_bytes() == first
    metadata = {p.key: p.value for p in onnx.load_from_string(first).metadata_props}
    assert metadata["classes"] == '["a", "b"]'
    assert '"weights": 2' in metadata["plan"]


def test_the_student_is_left_as_it_was(tmp_path: Path):
    model = student(Residual(), 2, 2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ship(model, tmp_path)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_quantizer_that_is_off_stays_off(tmp_path: Path):
    model = student(Residual(), 2, 2)
    model.conv1.input_quantizer.enabled.fill_(False)
    assert "conv1.input_quantizer" not in {row.name for row in ship(model, tmp_path).codes}


def test_a_float_network_is_the_baseline(tmp_path: Path):
    model = networks.live(Residual(), [images()])
    found = ship(model, tmp_path)
    assert found.layers == ()
    assert found.max_difference < 1e-3
    assert found.theoretical_bytes == found.float_bytes


def test_a_file_that_disagrees_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = student(Residual(), 4, 4)
    path = ship(model, tmp_path).path
    before = path.read_bytes()
    weights = importlib.import_module("fewbits.deploy.weights")
    honest = weights.pack

    def broken(codes: Any, bits: int) -> Any:
        codes = np.array(codes)
        codes.reshape(-1)[: codes.size // 8] ^= 1
        return honest(codes, bits)

    monkeypatch.setattr(weights, "pack", broken)
    with pytest.raises(ParityError, match=r"worst .*: \d+.* nothing was written"):
        ship(model, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["student.onnx"]


def test_small_file(tmp_path: Path):
    body = [nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    found = ship(student(Plain(*body, width=64), 2, 2), tmp_path)
    assert found.size_bytes <= 1.05 * found.theoretical_bytes + 500 * (len(found.layers) + 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tensorflow"}, "engine must be one of onnxruntime"),
        ({"path": "student.pt"}, "must end in .onnx"),
        ({"path": "nowhere/student.onnx"}, "folder that exists"),
        ({"example": torch.rand(3, 8, 8)}, "N x C x H x W"),
        ({"example": torch.rand(2, 4, 8, 8)}, "does not take"),
        ({"example": torch.randn(2, 3, 8, 8)}, r"0\.\.1"),
        ({"example": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "divide by 255"),
        ({"example": torch.full((2, 3, 8, 8), float("nan"))}, r"0\.\.1"),
        ({"normalisation": SimpleNamespace(mean=(0.5,), std=(0.5,))}, "each of the 3 channels"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str, tmp_path: Path):
    arguments = {"path": "student.onnx", "example": images(2)} | change
    with pytest.raises(ValueError, match=message):
        export(student(Residual(), 4, 4), tmp_path / arguments.pop("path"), **{"normalisation": None, **arguments})


def test_nan_weights_are_refused(tmp_path: Path):
    model = student(Residual(), 4, 4)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in conv1\.weight"):
        ship(model, tmp_path)


def test_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    for name in [n for n in sys.modules if n.startswith("fewbits.deploy.onnx")] + ["onnx_ir"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delattr("fewbits.deploy.onnx", raising=False)
    with pytest.raises(ImportError, match=r'pip install "fewbits\[onnx\]"'):
        ship(student(Residual(), 4, 4), tmp_path)
