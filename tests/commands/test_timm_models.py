"""From the command line to the engine: MobileNetV2, VGG and ViT on digits, taught by a float run, 4/4, exported."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits.cli import main
from fewbits.commands import load_run
from fewbits.data import load

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
        reason='timm is not installed: pip install "fewbits[timm]"',
    ),
]

INTEGER = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"}


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time of a short run."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 10)


@pytest.mark.parametrize(
    ("model", "size", "more", "in_float"),
    [
        # Depthwise layers, ReLU6, linear bottlenecks; channels that are always zero.
        pytest.param("timm:mobilenetv2_035", 32, [], set(), id="mobilenetv2"),
        pytest.param("vgg-small", 8, [], set(), id="vgg"),
        # It takes images of any size, and residual=8 cannot look into how it does that.
        pytest.param("timm:test_vit", 32, ["--residual", "none"], {"patch_embed.proj"}, id="vit"),
    ],
)
def test_train_teach_export(model: str, size: int, more: list[str], in_float: set[str], tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    teacher, student = tmp_path / "float", tmp_path / "student"
    common = ["train", "--model", model, "--data", "digits", "--image-size", str(size), "--per-class", "20"]
    common += ["--batch-size", "20", "--epochs", "1", "--lr", "0.02", "--no-progress", "--no-tensorboard"]
    assert main([*common, "--recipe", "float", "--output", str(teacher)]) == 0
    bits = ["--weights", "4", "--activations", "4", "--teacher", str(teacher), *more]
    assert main([*common, *bits, "--output", str(student)]) == 0
    assert json.loads((student / "run.json").read_text())["start"].startswith("run float")
    assert main(["export", str(student)]) == 0

    report = json.loads((student / "export.json").read_text())
    assert report["size_bytes"] < report["float_bytes"] / 4
    assert min(row["equal"] for row in report["codes"]) >= 0.999
    assert {row["name"] for row in report["layers"] if row["reason"]} == in_float
    assert all(row["kernel"] in INTEGER for row in report["layers"] if not row["reason"])
    # The file alone, on images that the proof has not seen.
    network, normalisation = load_run(student)
    images = load("digits", image_size=size).pixels(360)[256:]
    (got,) = onnxruntime.InferenceSession(student / "student.onnx").run(None, {"images": images.numpy()})
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (normalisation.mean, normalisation.std))
    with torch.no_grad():
        wanted = network.eval()((images - mean) / std).numpy()
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= 0.98
    assert np.abs(got - wanted).mean() <= 0.05 * np.abs(wanted).mean()
