"""A file is known by the student that it came from; nothing that it says about itself can be changed unseen."""

import copy
from pathlib import Path

import onnx
import pytest
import torch

from fewbits.data import Normalisation
from fewbits.deploy import check_seal, export, prove

from .networks import Plain, images, student


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    return student(Plain(), 4, 4)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def file(request: pytest.FixtureRequest, trained: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(request.param)
    path = tmp_path_factory.mktemp(request.param) / ("s.onnx" if request.param == "onnxruntime" else "s.xml")
    names = [str(number) for number in range(5)]
    options = {"normalisation": None, "engine": request.param, "class_names": names}
    export(trained, path, example=images(), **options)  # type: ignore[arg-type]
    return path


def test_its_own_file_is_known(trained: torch.nn.Module, file: Path):
    assert len(check_seal(file, trained, None)["seal"]) == 16


def test_another_state_and_another_normalisation_are_told(trained: torch.nn.Module, file: Path):
    with pytest.raises(ValueError, match="is not what this student exports to"):
        check_seal(file, trained, Normalisation((0.5,) * 3, (0.5,) * 3))
    again = copy.deepcopy(trained)
    with torch.no_grad():
        again.stem.weight.view(-1)[0] *= -1
    with pytest.raises(ValueError, match="before it was trained again"):
        check_seal(file, again, None)


def test_changed_and_missing_words(trained: torch.nn.Module, tmp_path: Path):
    path = tmp_path / "s.onnx"
    export(trained, path, example=images(), normalisation=None, class_names=list("abcde"))
    whole = onnx.load(path)
    for key in ("plan", "classes", "seal"):
        changed = onnx.ModelProto.FromString(whole.SerializeToString())
        entry = next(entry for entry in changed.metadata_props if entry.key == key)
        entry.value = entry.value.replace(entry.value[-3], "0" if entry.value[-3] != "0" else "1")
        onnx.save(changed, path)
        with pytest.raises(ValueError, match="or is damaged; export again"):
            prove(trained, path, example=images(), normalisation=None)
    changed.metadata_props.remove(entry)
    onnx.save(changed, path)
    with pytest.raises(ValueError, match="does not say which student it comes from: an older version"):
        prove(trained, path, example=images(), normalisation=None)
