"""Tiny ViT and Swin of timm: what is quantized, what stays float and is listed, QFD and FTL, export."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits import bound_steps, export
from fewbits.calibration import calibrate
from fewbits.convert import Rule, quantize
from fewbits.layers import QuantLayer
from fewbits.models.timm_models import import_timm
from fewbits.recipes import FTL, QFD, Recipe
from fewbits.summary import summarize

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
        reason='timm is not installed: pip install "fewbits[timm]"',
    ),
    # residual=8 says which additions it cannot reach; tests/test_streams.py looks at it.
    pytest.mark.filterwarnings("ignore:residual=8. values inside:UserWarning"),
    # The norm stands between a block and the layer that reads it.
    pytest.mark.filterwarnings("ignore:no quantized layer reads what:UserWarning"),
]


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 10)


def vit() -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48}
    return import_timm().create_model("vit_tiny_patch16_224", num_classes=3, **size)


def swin() -> nn.Module:
    size = {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}
    return import_timm().create_model("swin_tiny_patch4_window7_224", num_classes=3, **size)


both = pytest.mark.parametrize("make", [vit, swin])


def batch(num: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(num, 3, 32, 32), torch.arange(num) % 3


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def linear(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@both
def test_every_linear_layer_is_quantized(make: Callable[[], nn.Module]):
    model = make()
    student = quantize(model, 4, 4)
    assert quantized(student) == linear(model) | {"patch_embed.proj"}
    kinds = {name.split(".", 2)[-1] if name.startswith("blocks") else name for name in linear(model)}
    assert len(kinds) > 4  # qkv, proj, fc1, fc2 and the head at least
    for name in quantized(student):
        layer = student.get_submodule(name)
        bits = 8 if name in ("patch_embed.proj", "head", "head.fc") else 4
        assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (bits, bits), name


@both
@pytest.mark.parametrize(("pattern", "layers"), [("*.attn", {"qkv", "proj"}), ("*.mlp", {"fc1", "fc2"})])
def test_attention_and_mlp_are_selected_separately(make: Callable[[], nn.Module], pattern: str, layers: set[str]):
    model = make()
    chosen = {n for n in linear(model) if n.rpartition(".")[2] in layers}
    assert len(chosen) == 4  # two layers in each of two blocks
    kept = quantize(model, 4, 4, keep=(pattern,))
    assert quantized(kept) == (linear(model) | {"patch_embed.proj"}) - chosen
    ruled = quantize(model, 2, 2, rules=(Rule(pattern, weights=8, activations=8),))
    for name in quantized(ruled):
        layer, is_end = ruled.get_submodule(name), name in ("patch_embed.proj", "head", "head.fc")
        bits = 8 if name in chosen or is_end else 2
        assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (bits, bits), name


def test_patch_merging_is_selected_separately():
    model = swin()
    merging = {"layers.1.downsample.reduction"}
    assert merging < linear(model)
    assert quantized(quantize(model, 4, 4, keep=("*.downsample",))) == (linear(model) | {"patch_embed.proj"}) - merging
    ruled = quantize(model, 2, 2, rules=(Rule("*.downsample", weights=8, activations=8),))
    eight = {name for name in quantized(ruled) if ruled.get_submodule(name).weight_quantizer.bits == 8}
    assert eight == merging | {"patch_embed.proj", "head.fc"}


@both
def test_products_of_activations_are_listed_as_float(make: Callable[[], nn.Module]):
    model = make()
    summary = summarize(quantize(model, 4, 4), batch(1)[0])
    attention = {name for name, module in model.named_modules() if name.endswith(".attn")}
    assert {row.name for row in summary.products} == attention
    assert all(row.macs > 0 for row in summary.products)
    # Counted at 32 x 32 bits: the total is the layers' and theirs.
    layers = sum(row.bit_operations for row in summary.rows)
    products = sum(32 * 32 * row.macs for row in summary.products)
    assert summary.totals.bit_operations == layers + products
    assert str(summary).count("float: product of two activations") == len(attention) == 2


RECIPES: dict[str, Recipe] = {
    "vector": QFD(bits=4),
    "one bit": QFD(bits=1),
    "tokens": QFD(bits=4, pooled=False, reduction="mean"),
    "rounded": QFD(bits=4, retrain=False),
    "float": QFD(bits=32),
    "ftl": FTL(),
    "ftl by channel": FTL(axes="channel", channel_dim=-1),
}


@both
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(make: Callable[[], nn.Module], name: str):
    recipe, teacher, (images, labels) = RECIPES[name], make(), batch()
    student = quantize(teacher, 8, 8)
    held: Any = None
    for phase in range(len(recipe.phases())):
        made = recipe.objective(student, teacher, batches=[images], phase=phase, networks=held)
        held = made.networks
        optimizer = torch.optim.SGD(made.param_groups(1e-3))
        bound_steps(optimizer, made)
        for step in range(2):
            losses = made(images, labels)
            assert bool(torch.isfinite(losses.total))
            losses.total.backward()
            if made.taught is student and step == 0:
                distance = losses.terms[list(losses.terms)[-1]].item()
                gradients = {
                    n: p.grad for n, p in student.named_parameters() if n.endswith(("qkv.weight", "fc2.weight"))
                }
                assert len(gradients) == 4
                assert all(bool(gradient.any()) for gradient in gradients.values())
            optimizer.step()
            optimizer.zero_grad()
    # The student starts from the teacher, at 8 bits: it is near, though both signs occur in these features.
    num = student.get_submodule("head" if make is vit else "head.fc").in_features
    most = {"one bit": 0.6 * num, "tokens": 0.1, "ftl": 0.1, "ftl by channel": 0.5}.get(name, 0.1 * num)
    assert distance < most


@pytest.mark.parametrize("residual", [8, None])
def test_a_vision_transformer_is_exported(residual: int | None, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    student, images = quantize(vit(), 4, 4, residual=residual), batch(8)[0]
    calibrate(student, [images])
    done = export(student.eval(), tmp_path / "vit.onnx", example=images, normalisation=None)
    kernels = {row.name: row.kernel for row in done.layers}
    assert all("Integer" in kernels[name] or "Q" in kernels[name] for name in linear(vit())), kernels
