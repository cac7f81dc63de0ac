"""Weights files, whole, foreign, cut and malicious; and networks that they do not fit."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits.models import adapt, build, load_into, load_weights

STATE = {"a.weight": torch.arange(1000.0), "b": torch.tensor([1, 2])}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrapped",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE},
        {"state_dict": {f"module.{name}": value for name, value in STATE.items()}, "best": 0.9},
        {f"_orig_mod.{name}": value for name, value in STATE.items()},
    ],
)
def test_pytorch_files(tmp_path, suffix, zipped, wrapped):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
    assert same(load_weights(path), STATE)


def test_safetensors_and_run_folders(tmp_path):
    save_file(STATE, tmp_path / "student.safetensors")
    assert same(load_weights(tmp_path / "student.safetensors"), STATE)
    assert same(load_weights(tmp_path), STATE)


def test_a_prefix_that_some_names_carry_stays(tmp_path):
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pt")
    assert same(load_weights(tmp_path / "x.pt"), state)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
def test_a_malicious_file_runs_nothing(tmp_path, monkeypatch, protocol, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    if how == "bare":
        path.write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=protocol))
    else:
        torch.save({"w": Malicious()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"x\.pt .*refused") as caught:
        load_weights(path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_whole_model_is_refused_by_name(tmp_path):
    torch.save(build("resnet20", num_classes=10), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"asks for fewbits\.models\.resnet_cifar\.CifarResNet, which is refused"):
        load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
def test_a_cut_file(tmp_path, share, how):
    path = tmp_path / ("x.safetensors" if how == "safetensors" else "x.pt")
    if how == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=how == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"x\.(pt|safetensors) (is cut|is not a whole|asks for)"):
        load_weights(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"epoch": 3, "w": torch.zeros(1)}, "epoch are no tensors"),
        ({}, "must hold a state dict, got dict"),
        (torch.zeros(3), "must hold a state dict, got Tensor"),
        ({1: torch.zeros(1)}, "1 are no tensors"),
    ],
)
def test_other_contents(tmp_path, content, text):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=text):
        load_weights(tmp_path / "x.pt")


def test_other_paths(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds no student\.safetensors"):
        load_weights(tmp_path)
    (tmp_path / "x.onnx").write_text("")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or one of"):
        load_weights(tmp_path / "x.onnx")


def test_load_into():
    source, target = build("resnet20", num_classes=10), build("resnet20", num_classes=10)
    load_into(target, source.state_dict(), what="x")
    assert same(source.state_dict(), target.state_dict())


def test_files_without_batch_norm_counters():
    source = build("resnet20", num_classes=10).state_dict()
    old = {name: value for name, value in source.items() if not name.endswith("num_batches_tracked")}
    load_into(build("resnet20", num_classes=10), old, what="x")
    adapt(build("resnet20", num_classes=10), old)


def test_another_architecture_is_described():
    target = build("resnet56", num_classes=10)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"the weights from runs/a do not fit resnet56: ") as caught:
        load_into(target, build("resnet20", num_classes=7).state_dict(), what="runs/a")
    text = str(caught.value)
    assert "180 missing: layer1.3.conv1.weight, " in text
    assert "and 176 more" in text
    assert "linear.weight (7, 64) for (10, 64)" in text
    assert same(before, target.state_dict())
    with pytest.raises(ValueError, match=r"216 unexpected: layer1\.3\.conv1\.weight"):
        load_into(build("resnet20", num_classes=10), before, what="x")


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg-small"])
def test_adapt_starts_only_the_classifier_afresh(name):
    source, target = build(name, num_classes=10), build(name, num_classes=3)
    own = target.linear.weight.detach().clone()
    assert adapt(target, source.state_dict()) == ["linear.weight", "linear.bias"]
    assert torch.equal(target.linear.weight, own)
    rest = {key: value for key, value in target.state_dict().items() if not key.startswith("linear")}
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in rest.items())
    assert adapt(build(name, num_classes=10), source.state_dict()) == []


def test_adapt_refuses_everything_else():
    with pytest.raises(ValueError, match=r"do not fit resnet20: 1 of another shape: conv1\.weight"):
        adapt(build("resnet20", num_classes=10, channels=1), build("resnet20", num_classes=3).state_dict())


def test_adapt_without_any_layer():
    with pytest.raises(ValueError, match="1 unexpected: w"):
        adapt(torch.nn.ReLU(), {"w": torch.zeros(1)})


def test_a_file_that_cannot_be_opened(tmp_path: Path):
    (tmp_path / "student.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"holds no student\.safetensors"):
        load_weights(tmp_path)
