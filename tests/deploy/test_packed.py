"""Packed files: the student's own numbers bit for bit, at true size, and an error instead of wrong numbers."""

import copy
import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fewbits as fb
from fewbits.blocks import bireal
from fewbits.convert import Rule, quantizers_of
from fewbits.deploy.packed import read_header
from fewbits.precision import Precision, set_bits, set_precision
from fewbits.quantizers import METHODS, QuantSpec, build
from fewbits.quantizers.packed import PackedWeight

GRIDS = [(method, bits) for method, made in METHODS.items() for bits in made.bits]


class Small(nn.Module):
    """Grouped, strided, padded; a linear layer; odd numbers of weights, so that codes cross bytes."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.bn = nn.BatchNorm2d(7)
        self.relu = nn.ReLU()
        self.deep = nn.Conv2d(7, 14, 3, stride=stride, padding=1, groups=7, bias=False)
        self.relu2 = nn.ReLU()
        self.point = nn.Conv2d(14, 5, 1)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.relu2(self.deep(self.relu(self.bn(self.stem(x)))))
        return self.head(self.relu3(self.point(x)).mean((2, 3)))


IMAGES = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def calibrated(network, images=IMAGES, **plan):
    student = fb.quantize(network, **plan)
    fb.calibrate(student, [images])
    student.train()
    student(images)  # running statistics of its own
    return student.eval()


def outputs(network, images=IMAGES):
    with torch.no_grad():
        return network(images)


def small(**plan):
    return calibrated(Small(), ends=32, residual=None, **plan)


@pytest.mark.parametrize(("method", "bits"), GRIDS)
def test_every_quantizer_at_every_width_comes_back_bit_for_bit(method, bits, tmp_path):
    student = small(weights=bits, activations=bits, quantizer=method)
    fb.pack(student, tmp_path / "a.safetensors")
    loaded = fb.load_packed(tmp_path / "a.safetensors", Small())
    assert torch.equal(outputs(loaded), outputs(student))
    for name in ("deep", "point"):
        layer, own = loaded.get_submodule(name), student.get_submodule(name)
        assert isinstance(layer.weight_quantizer, PackedWeight)
        assert torch.equal(layer.weight, own.weight_quantizer(own.weight))  # where others look, the decoded weight lies
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["deep.weight"].numel() == -(-student.deep.weight.numel() * bits // 8)


@given(
    grid=st.sampled_from([*GRIDS, *(("lsq-channel", bits) for bits in range(1, 9))]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    scale=st.sampled_from([1e-6, 0.05, 1.0, 40.0]),
    kind=st.sampled_from(["normal", "ties", "constant", "zeros", "outlier"]),
    seed=st.integers(0, 2**16),
)
def test_codes_are_the_quantizers_own_values(grid, shape, scale, kind, seed):
    method, bits = grid
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    weight = {
        "normal": weight,
        "ties": (weight / scale * 2).round() * scale / 2,
        "constant": torch.full(shape, scale),
        "zeros": torch.zeros(shape),
        "outlier": weight.clone().index_fill_(0, torch.tensor(0), 1e4 * scale),
    }[kind]
    granularity = "channel" if method == "lsq-channel" else "tensor"
    quantizer = build(QuantSpec(method.removesuffix("-channel"), bits, "weight", granularity), shape[0], 0)
    quantizer.calibrate(weight)
    packed = PackedWeight.of(quantizer, weight)
    expected = quantizer(weight).detach()
    assert torch.equal(packed(torch.full(shape, torch.nan)), expected)
    assert torch.equal(packed.encode(weight).decode(), expected)
    assert torch.equal(packed.encode(weight).integers, quantizer.encode(weight).integers)
    assert int(packed.codes.max()) < 2**bits


def test_requantizing_decoded_weights_would_not_do():
    """Why codes are kept: this is what re-encoding gives."""
    student = small(weights=8, activations=8, quantizer="dorefa")
    layer = student.deep
    once = layer.weight_quantizer(layer.weight)
    assert not torch.equal(layer.weight_quantizer(once), once)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_named_network_is_as_small_as_its_bits(bits, tmp_path):
    images = torch.rand(2, 3, 16, 16)
    network = fb.models.build("resnet20", num_classes=10)
    student = calibrated(network, images, weights=bits, activations=bits)
    packed = fb.pack(student, tmp_path / "a.safetensors", example=images)
    parameters = sum(
        p.numel() * (student.get_submodule(n.rpartition(".")[0]).weight_quantizer.bits if p.ndim > 1 else 32)
        for n, p in student.named_parameters()
    )
    assert packed.num_layers == 20
    assert packed.size_bytes == (tmp_path / "a.safetensors").stat().st_size
    # Running statistics are saved too, although no theory of bits counts them.
    assert packed.theoretical_bytes == parameters // 8
    assert packed.saved_bytes == pytest.approx(parameters / 8 + 4 * 2 * 688, abs=20 + 4 * 60)
    assert packed.size_bytes <= 1.05 * parameters / 8 + 500 * packed.num_layers
    assert packed.float_bytes == 4 * sum(p.numel() for p in network.parameters())
    assert torch.equal(outputs(fb.load_packed(tmp_path / "a.safetensors", network), images), outputs(student, images))


def test_the_same_student_gives_the_same_bytes_and_a_packed_one_packs_again(tmp_path):
    student = small(weights=3, activations=3)
    for name in "ab":
        fb.pack(student, tmp_path / f"{name}.safetensors")
    loaded = fb.load_packed(tmp_path / "a.safetensors", Small())
    fb.pack(loaded, tmp_path / "c.safetensors")
    contents = {(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"}
    assert len(contents) == 1
    assert not list(tmp_path.glob(".*"))


def test_the_student_is_not_changed(tmp_path):
    student = small(weights=2, activations=2).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fb.pack(student, tmp_path / "a.safetensors", example=IMAGES)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_mixed_widths_kept_layers_changed_bits_and_closed_gates(tmp_path):
    plan = fb.Plan.of(4, 4, keep=("stem",), rules=(Rule("point", weights=7, activations=32),))
    student = calibrated(Small(), plan=plan)
    set_bits(student, weights=2)
    fb.calibrate(student, [IMAGES])
    fb.pack(student, tmp_path / "a.safetensors", example=IMAGES)
    loaded = fb.load_packed(tmp_path / "a.safetensors", Small())
    assert torch.equal(outputs(loaded), outputs(student))
    assert {n: layer["bits"] for n, layer in read_header(tmp_path / "a.safetensors")["layers"].items()} == {
        "deep": 2,
        "head": 8,
        "point": 7,
    }
    set_precision(student, Precision(weights=False))
    student.deep.weight_quantizer.enabled.fill_(True)
    packed = fb.pack(student, tmp_path / "b.safetensors", example=IMAGES)
    assert packed.num_layers == 1
    assert torch.equal(outputs(fb.load_packed(tmp_path / "b.safetensors", Small())), outputs(student))


class Tied(nn.Module):
    """One weight in two layers, one weight in a layer and in plain sight, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Embedding(6, 6)
        self.again = self.third
        self.second.weight = self.first.weight

    def tie(self):
        self.third.weight = self.table.weight
        return self

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.again(self.third(x)) + self.table.weight[0]


def test_tied_weights_and_weights_that_others_read(tmp_path):
    student = calibrated(Tied().tie(), torch.randn(5, 6), weights=2, activations=4, ends=4, residual=None)
    x = torch.randn(5, 6)
    fb.pack(student, tmp_path / "a.safetensors", example=x)
    loaded = fb.load_packed(tmp_path / "a.safetensors", Tied().tie())
    assert torch.equal(outputs(loaded, x), outputs(student, x))
    assert torch.equal(loaded.table.weight, student.table.weight)
    with pytest.raises(ValueError, match="does not fit model, a Tied"):
        fb.load_packed(tmp_path / "a.safetensors", Tied())


@pytest.mark.parametrize("branch", [None, "bottleneck", "squeeze", "grouped"])
def test_binary_networks_with_shortcuts_and_branches(branch, tmp_path):
    network = bireal(fb.models.build("resnet20", num_classes=4), "prelu", branch)
    images = torch.rand(2, 3, 16, 16)
    student = calibrated(network, images, weights=1, activations=1, quantizer="react")
    packed = fb.pack(student, tmp_path / "a.safetensors", example=images)
    loaded = fb.load_packed(tmp_path / "a.safetensors", network)
    assert torch.equal(outputs(loaded, images), outputs(student, images))
    assert packed.size_bytes <= 1.05 * packed.saved_bytes + 500 * packed.num_layers


@pytest.mark.parametrize("name", ["timm:mobilenetv2_035", "timm:vit_tiny_patch16_224", "timm:resnet10t"])
def test_networks_of_timm(name, tmp_path):
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip('timm is not installed: pip install "fewbits[timm]"')
    images = torch.rand(2, 3, 32, 32)
    network = fb.models.build(name, num_classes=5, image_size=32)
    residual = None if "vit" in name else 8
    student = calibrated(network, images, weights=2, activations=4, residual=residual)
    packed = fb.pack(student, tmp_path / "a.safetensors", example=images)
    loaded = fb.load_packed(tmp_path / "a.safetensors", network)
    assert torch.equal(outputs(loaded, images), outputs(student, images))
    assert packed.size_bytes <= 1.05 * packed.saved_bytes + 500 * packed.num_layers
    assert packed.size_bytes * 5 < packed.float_bytes


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    fb.pack(small(weights=3, activations=3), path)
    whole = path.read_bytes()
    step = max(1, len(whole) // 400)
    for place in [*range(16), *range(16, len(whole), step), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|did not write|has format"):
            fb.load_packed(path, Small())


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_cut_file_is_refused(kept, tmp_path):
    path = tmp_path / "a.safetensors"
    fb.pack(small(weights=2, activations=2), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or no safetensors file"):
        fb.load_packed(path, Small())


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        fb.load_packed(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match="no safetensors file"):
        fb.load_packed(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="a safetensors file that fewbits pack did not write"):
        fb.load_packed(path)
    for header, said in (
        ("{", "does not match its checksum"),
        ("[]", "has format None"),
        ('{"format": 9}', "format 9"),
    ):
        save_file({"weight": torch.ones(())}, path, {"fewbits_packed": header})
        with pytest.raises(ValueError, match=said):
            fb.load_packed(path)
    save_file({"weight": torch.ones(())}, path, {"fewbits_packed": json.dumps({"format": 1, "sha256": "0"})})
    with pytest.raises(ValueError, match="does not match its checksum"):
        fb.load_packed(path)


def test_another_architecture_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    fb.pack(small(weights=2, activations=2), path)
    with pytest.raises(ValueError, match="has no name to build it by; pass the float architecture"):
        fb.load_packed(path)
    turned = Small()  # as many weights, in another order
    turned.point = nn.Conv2d(5, 14, 1)
    others = [
        Small(stride=1),  # same shapes, other results
        nn.Sequential(nn.Conv2d(3, 7, 3)),
        turned,
        small(weights=2, activations=2, quantizer="ewgs"),
        small(weights=3, activations=2),
    ]
    for other in others[:3]:
        with pytest.raises(ValueError, match=r"does not fit model|matches no layer"):
            fb.load_packed(path, other)
    with pytest.raises(ValueError, match="does not fit model"):
        fb.load_packed(path, others[3])
    assert torch.equal(outputs(fb.load_packed(path, others[4])), outputs(fb.load_packed(path, Small())))


def test_what_cannot_be_packed_is_said(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="never calibrated"):
        fb.pack(fb.quantize(Small(), 2, 2, residual=None), path)
    with pytest.raises(ValueError, match="has no quantized weight"):
        fb.pack(Small(), path)
    with pytest.raises(TypeError, match="student"):
        fb.pack({}, path)
    student = small(weights=2, activations=2)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        fb.pack(student, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="folder that exists"):
        fb.pack(student, tmp_path / "nowhere" / "a.safetensors")
    with torch.no_grad():
        student.deep.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="deep: the codes of method 'lsq'"):
        fb.pack(student, path)
    student = small(weights=2, activations=2)
    student.bn.running_mean[0] = torch.nan
    with pytest.raises(fb.ParityError, match="or it holds NaN"):
        fb.pack(student, path)
    assert not list(tmp_path.iterdir())


def test_a_packed_network_is_for_inference(tmp_path):
    path = tmp_path / "a.safetensors"
    student = small(weights=2, activations=2)
    fb.pack(student, path)
    loaded = fb.load_packed(path, Small())
    expected = outputs(student)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trained_on = [
        lambda: outputs(loaded.train()),
        lambda: loaded.deep.weight_quantizer.train()(loaded.deep.weight),
        lambda: fb.calibrate(loaded, [IMAGES], again=True),
        lambda: set_bits(loaded, weights=3),
    ]
    for wrong in trained_on:
        with pytest.raises(ValueError, match="a packed network is for inference"):
            wrong()
    with pytest.raises(RuntimeError, match="a packed network is for inference"):
        copy.deepcopy(loaded).load_state_dict(fb.float_state(student))
    assert torch.equal(outputs(loaded.eval()), expected)  # no batch norm was moved
    own = fb.load_packed(path, Small())
    own.load_state_dict(loaded.state_dict())
    assert torch.equal(outputs(own), expected)
    set_precision(loaded, Precision(weights=False))  # closed gates pass the decoded weights on
    assert torch.equal(outputs(loaded), expected)
    assert "packed" in repr(loaded)


def test_plan_normalisation_and_quantizer_state_come_along(tmp_path):
    student = small(weights=2, activations=2, quantizer="ewgs")
    student.__dict__["fewbits_normalisation"] = fb.data.Normalisation((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    fb.pack(student, tmp_path / "a.safetensors")
    loaded = fb.load_packed(tmp_path / "a.safetensors", Small())
    for key in ("fewbits_plan", "fewbits_normalisation"):
        assert loaded.__dict__[key] == student.__dict__[key]
    own = dict(quantizers_of(loaded))
    for name, quantizer in quantizers_of(student):
        assert own[name].spec == quantizer.spec
        assert own[name].engine == quantizer.engine
        assert bool(own[name].calibrated) == bool(quantizer.calibrated) or quantizer.spec.role == "weight"


@pytest.mark.parametrize(("method", "bits"), [("lsq", 2), ("dorefa", 3), ("ewgs", 4), ("lsq", 8), ("react", 1)])
def test_a_packed_network_exports_like_its_student(method, bits, tmp_path):
    pytest.importorskip("onnxruntime")
    student = calibrated(Small(), weights=bits, activations=bits, quantizer=method, residual=None)
    fb.pack(student, tmp_path / "a.safetensors")
    loaded = fb.load_packed(tmp_path / "a.safetensors", Small())
    files: list[Path] = []
    for name, network in (("own", student), ("packed", loaded)):
        files.append(tmp_path / f"{name}.onnx")
        fb.export(network, files[-1], example=IMAGES, normalisation=None)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert fb.summarize(loaded, IMAGES[:1]).totals.size_bytes == fb.summarize(student, IMAGES[:1]).totals.size_bytes


def test_a_folder_is_told_from_a_file_that_is_not_there(tmp_path):
    """Found: a run folder "does not exist"."""
    with pytest.raises(ValueError, match="is a folder; give the file in it that fewbits pack wrote"):
        fb.load_packed(tmp_path)


def test_pack_and_export_mean_the_same_by_theoretical(tmp_path):
    pytest.importorskip("onnxruntime")
    images = torch.rand(2, 3, 16, 16)
    student = calibrated(fb.models.build("resnet20", num_classes=10), images, weights=2, activations=2)
    packed = fb.pack(student, tmp_path / "a.safetensors", example=images)
    exported = fb.export(student, tmp_path / "a.onnx", example=images, normalisation=None, check=False)
    assert (packed.theoretical_bytes, packed.float_bytes) == (exported.theoretical_bytes, exported.float_bytes)
