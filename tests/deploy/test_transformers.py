"""Tiny ViT and Swin of timm in ONNX Runtime: layer by layer, windows in the batch, kernels and their reasons."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fewbits.calibration import calibrate
from fewbits.convert import quantize
from fewbits.deploy import Exported, export
from fewbits.models.timm_models import import_timm

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
        reason='timm is not installed: pip install "fewbits[timm]"',
    ),
    pytest.mark.filterwarnings("ignore:residual=8. values inside:UserWarning"),
]


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 10)


def swin() -> nn.Module:
    """The second block of each stage shifts its windows, but where one window is the whole map."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24}
    return SwinTransformer(**sizes, depths=(2, 2), num_heads=(2, 4), num_classes=5)


def vit() -> nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def student(model: nn.Module, weights: int, activations: int, **options: Any) -> tuple[nn.Module, Tensor]:
    images = torch.rand(16, 3, 32, 32)
    quantized = quantize(model, weights, activations, **options)
    calibrate(quantized, [images])
    return quantized.eval(), images


def ship(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    return export(model, folder / "student.onnx", example=images, normalisation=None)


@pytest.mark.parametrize(("make", "residual"), [(vit, 8), (vit, None), (swin, 8)])
def test_every_linear_layer_runs_on_integers(make: Callable[[], nn.Module], residual: int | None, tmp_path: Path):
    network = make()
    model, images = student(network, 4, 4, residual=residual)
    found = ship(model, images, tmp_path)
    assert min(row.equal for row in found.codes) >= 0.999
    # Layer by layer: each layer's input is a place of its own.
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {f"{name}.input_quantizer" for name in linear} <= {row.name for row in found.codes}
    by_name = {row.name: row for row in found.layers}
    assert set(by_name) == linear | {"patch_embed.proj"}
    for name in linear:
        assert by_name[name].kernel in {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}, by_name[name]
        assert by_name[name].reason == ""
    assert (by_name["patch_embed.proj"].kernel == "QLinearConv") is (residual == 8)
    # Another batch size than the one that was traced, and the same predictions.
    more = torch.rand(5, 3, 32, 32)
    session = onnxruntime.InferenceSession(found.path)
    for x in (images, more, more[:1]):
        got = np.asarray(session.run(None, {"images": x.numpy()})[0])
        with torch.no_grad():
            wanted = model(x).numpy()
        assert (got.argmax(1) == wanted.argmax(1)).all()
        assert np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_a_layer_that_is_not_fused_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fewbits.deploy.sessions.kernels", lambda model: ({}, None))
    model, images = student(vit(), 4, 4)
    assert all("does not fuse it" in row.reason for row in ship(model, images, tmp_path).layers)
