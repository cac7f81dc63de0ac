from pathlib import Path

import pytest
import torch

from fewbits.deploy import accuracy, bench, costs, export

from .networks import Residual, images, live, student


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder, x = tmp_path_factory.mktemp("exported"), images(8)
    paths = {"float": folder / "float.onnx", "student": folder / "student.onnx"}
    export(live(Residual(), [x]), paths["float"], example=x, normalisation=None)
    export(student(Residual(), 2, 2), paths["student"], example=x, normalisation=None, minimum_equal=0.0)
    return paths


def test_rows_and_ratios(files: dict[str, Path]):
    rows = bench(files, images(3), batch_sizes=(1, 5), repeats=3)
    assert [(row.name, row.batch_size) for row in rows] == [("float", 1), ("student", 1), ("float", 5), ("student", 5)]
    for row in rows:
        assert row.size_bytes == files[row.name].stat().st_size
        assert row.latency_ms > 0 < row.load_ms
        if row.name == "float":
            assert (row.ratio, row.verdict) == (1.0, "")
        else:
            assert ("slower" in row.verdict) == (row.ratio > 1)


def test_peak_memory_holds_the_batch(files: dict[str, Path]):
    batch = 8192
    rows = bench({"float": files["float"]}, images(1), batch_sizes=(1, batch), repeats=1, memory=True)
    small, large = (row.memory_bytes for row in rows)
    if small is None or large is None:
        pytest.skip("this system keeps no peak")
    one_map = 4 * batch * 8 * 8 * 8  # what the stem gives, 8 channels in float
    assert large - small > one_map
    assert large < 20 * one_map
    assert rows[0].images_per_second == pytest.approx(1e3 / rows[0].latency_ms)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_costs_name_the_layers(engine: str, tmp_path: Path):
    pytest.importorskip(engine)
    model, path = student(Residual(), 2, 2), tmp_path / "student.onnx"
    export(model, path, example=images(8), normalisation=None, minimum_equal=0.0, engine=engine)
    found = costs(path, images(2), batch_size=4, repeats=5)
    assert {"stem", "conv1", "conv2", "head"} <= {row.name for row in found}
    assert [row.ms for row in found] == sorted((row.ms for row in found), reverse=True)
    assert sum(row.share for row in found) == pytest.approx(1)


def test_accuracy_is_pytorchs(files: dict[str, Path]):
    x = images(8)
    model = student(Residual(), 2, 2)
    path = files["student"].with_name("again.onnx")
    export(model, path, example=x, normalisation=None, minimum_equal=0.0)
    with torch.no_grad():
        labels = model(x).argmax(1)
    assert accuracy(path, [(x[:5], labels[:5]), (x[5:], labels[5:])]) >= 7 / 8


def test_bad_input(files: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="no file"):
        bench({}, images(1))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        bench(files, images(1), repeats=0)
    with pytest.raises(ValueError, match="there is no file"):
        accuracy(tmp_path / "absent.onnx", [])
    (tmp_path / "damaged.onnx").write_bytes(files["student"].read_bytes()[:500])
    with pytest.raises(ValueError, match=r"damaged\.onnx is no ONNX model"):
        accuracy(tmp_path / "damaged.onnx", [])
    with pytest.raises(ValueError, match="no image"):
        accuracy(files["student"], [])
