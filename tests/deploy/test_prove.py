"""A file is proved against its student, and refused where it is another's."""

from pathlib import Path

import pytest
import torch

import fewbits as fb
from fewbits.deploy import export, prove

from .networks import Plain, images, student

NAMES = {"onnxruntime": "s.onnx", "openvino": "s.xml"}


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    return student(Plain(), 4, 4)


@pytest.mark.parametrize("engine", NAMES)
def test_agrees_with_what_export_found(engine: str, trained: torch.nn.Module, tmp_path: Path):
    made = export(trained, tmp_path / NAMES[engine], example=images(), normalisation=None, engine=engine)
    found = prove(trained, made.path, example=images(), normalisation=None)
    assert found.engine == engine
    # PyTorch's own float noise, from one process or thread to the next, is in the logits alone.
    assert found.codes[:-1] == made.codes[:-1]
    assert found.codes[-1].equal == 1
    assert found.equal_predictions == made.equal_predictions
    assert (found.first is None) == all(row.equal == 1 for row in found.codes if row.bits < 32)


@pytest.mark.parametrize("engine", NAMES)
def test_anothers_file_is_refused(engine: str, trained: torch.nn.Module, tmp_path: Path):
    made = export(trained, tmp_path / NAMES[engine], example=images(), normalisation=None, engine=engine)
    other = student(Plain(), 4, 4)
    with torch.no_grad():
        next(m for m in other.modules() if isinstance(m, torch.nn.Linear)).bias[0] += 1
    with pytest.raises(ValueError, match="is not what this student exports to"):
        prove(other, made.path, example=images(), normalisation=None)
    with pytest.raises(ValueError, match="there is no file"):
        prove(trained, tmp_path / "absent.onnx", example=images(), normalisation=None)


def test_damaged_weights_are_refused(trained: torch.nn.Module, tmp_path: Path):
    made = export(trained, tmp_path / "s.xml", example=images(), normalisation=None, engine="openvino")
    weights = made.path.with_suffix(".bin")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"is not what this student exports to|OpenVINO cannot load or run"):
        prove(trained, made.path, example=images(), normalisation=None)


def test_probe_names_real_kernels():
    found = {(row.engine, row.bits): row.kernel for row in fb.deploy.probe()}
    assert found["onnxruntime", "4/4"] == "QLinearConv"
    assert found["openvino", "2/2"].lower().endswith("_i8")
    assert found["openvino", "1/1"].endswith("_u1")
