"""Where the parts of a network are, for ours, for timm's and for those that a user describes."""

import dataclasses
import importlib.util
import warnings

import pytest
import torch
from torch import Tensor, nn

from fewbits.anatomy import Anatomy, before_pooling, readers
from fewbits.convert import quantize
from fewbits.distill import Networks, Tap
from fewbits.models import build

# head, stages, number of blocks, first and last block
KNOWN = {
    "resnet20": ("linear", ("layer1", "layer2", "layer3"), 9, "layer1.0", "layer3.2"),
    "resnet18": ("linear", ("layer1", "layer2", "layer3", "layer4"), 8, "layer1.0", "layer4.1"),
    "vgg-small": ("linear", ("stage1", "stage2", "stage3"), 0, None, None),
    "timm:resnet18": ("fc", ("layer1", "layer2", "layer3", "layer4"), 8, "layer1.0", "layer4.1"),
    "timm:mobilenetv2_100": (
        "classifier",
        ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"),
        17,
        "blocks.0.0",
        "blocks.6.0",
    ),
    "timm:vit_tiny_patch16_224": ("head", tuple(f"blocks.{n}" for n in range(12)), 12, "blocks.0", "blocks.11"),
    "timm:deit_tiny_distilled_patch16_224": (
        "head",
        tuple(f"blocks.{n}" for n in range(12)),
        12,
        "blocks.0",
        "blocks.11",
    ),
    "timm:swin_tiny_patch4_window7_224": (
        "head.fc",
        ("layers.0", "layers.1", "layers.2", "layers.3"),
        12,
        "layers.0.blocks.0",
        "layers.3.blocks.1",
    ),
    "timm:regnety_002": ("head.fc", ("s1", "s2", "s3", "s4"), 13, "s1.b1", "s4.b7"),
    "timm:vgg11_bn": (
        "head.fc",
        ("features.2", "features.6", "features.13", "features.20", "features.27", "features.28"),
        0,
        None,
        None,
    ),
}


def make(name: str) -> nn.Module:
    if name.startswith("timm:") and not (importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision")):
        pytest.skip('timm is not installed: pip install "fewbits[timm]"')
    with torch.device("meta" if "vgg" in name else "cpu"):  # the large ones without memory
        return build(name, num_classes=7, image_size=64)


@pytest.mark.parametrize("name", KNOWN)
def test_known_networks(name: str):
    head, stages, num_blocks, first, last = KNOWN[name]
    model = make(name)
    anatomy = Anatomy.of(model)
    assert anatomy.head == head
    assert model.get_submodule(head).out_features == 7
    assert anatomy.stages == stages
    assert len(anatomy.blocks) == num_blocks
    if num_blocks:
        assert (anatomy.blocks[0], anatomy.blocks[-1]) == (first, last)


@pytest.mark.parametrize(
    "name", ["resnet20", "timm:resnet18", "timm:mobilenetv2_100", "timm:swin_tiny_patch4_window7_224"]
)
def test_stages_give_feature_maps_in_order(name: str):
    """Taps on their outputs: four dimensions, resolution falling, in the order of execution."""
    model, seen = make(name).eval(), []
    anatomy = Anatomy.of(model)
    for part in (*anatomy.stages, *anatomy.blocks):
        model.get_submodule(part).register_forward_hook(
            lambda module, args, output, part=part: seen.append((part, tuple(output.shape)))
        )
    features: list[Tensor] = []
    model.get_submodule(anatomy.head).register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    stages = [entry for entry in seen if entry[0] in anatomy.stages]
    assert tuple(part for part, _ in stages) == anatomy.stages
    assert tuple(part for part, _ in seen if part in anatomy.blocks) == anatomy.blocks
    channels_last = "swin" in name
    sizes = [shape[1] if channels_last else shape[2] for _, shape in stages]
    assert all(len(shape) == 4 for _, shape in stages)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert features[0].ndim == 2


@pytest.mark.parametrize("name", ["resnet20", "vgg-small", "timm:mobilenetv2_100", "timm:resnet18"])
def test_the_student_has_its_teacher_s_anatomy(name: str):
    """Quantizers that hang on modules make no block of them."""
    model = make(name) if name != "vgg-small" else build(name, num_classes=7)
    assert Anatomy.of(quantize(model)) == Anatomy.of(model)


def test_the_last_linear_layer_or_else_convolution_is_the_head():
    assert Anatomy.of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2))).head == "2"
    assert Anatomy.of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten())).head == "1"
    with pytest.raises(ValueError, match=r"Sequential has no .*Linear and no .*Conv2d"):
        Anatomy.of(nn.Sequential(nn.ReLU()))


def two_heads() -> nn.Module:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier, self.auxiliary = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x).mean((2, 3)))

    return TwoHeads()


def test_a_user_s_own_anatomy():
    stated = Anatomy(stages=("body",), blocks=(), head="classifier")
    images = torch.zeros(1, 3, 4, 4)
    networks = Networks(two_heads(), two_heads(), images, {"student": stated})
    assert networks.anatomy("student") == stated
    assert networks.anatomy("teacher").head == "auxiliary"
    assert Tap.feature(networks, "student") == Tap("student", "classifier", "input")


@pytest.mark.parametrize("part", ["stages", "blocks", "head"])
def test_an_anatomy_that_does_not_fit(part: str):
    stated = Anatomy(stages=("body",), blocks=(), head="classifier")
    wrong = dataclasses.replace(stated, **{part: "klassifier" if part == "head" else ("klassifier",)})
    with pytest.raises(ValueError, match="anatomy names 'klassifier', but the teacher has no such module"):
        Networks(two_heads(), two_heads(), torch.zeros(1, 3, 4, 4), {"teacher": wrong})


# the first quantized layer that reads each stage's output, and the module that gives what is pooled
BEHIND = {
    "resnet20": (["layer2.0.conv1", "layer3.0.conv1", None], "layer3.2.relu2"),
    "resnet18": (["layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1", None], "layer4.1.relu2"),
    "vgg-small": (["stage2.conv1", "stage3.conv1", None], "stage3.pool"),
    "timm:resnet18": (["layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1", None], "layer4.1.act2"),
    "timm:mobilenetv2_100": (
        ["blocks.1.0.conv_pw", "blocks.2.0.conv_pw", "blocks.3.0.conv_pw", "blocks.5.0.conv_pw", "conv_head"],
        "bn2.act",
    ),
    "timm:swin_tiny_patch4_window7_224": ([None] * 4, "norm"),
}


@pytest.mark.parametrize("residual", [8, None])
@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_the_stages(name: str, residual: int | None, monkeypatch: pytest.MonkeyPatch):
    """Also with stream quantizers in between, and where additions and ReLUs write in place (timm's ResNet)."""
    if name.startswith("timm:"):
        make(name)  # skips where there is no timm
    layers, pooled = BEHIND[name]
    model, image = build(name, num_classes=7, image_size=64), torch.randn(1, 3, 64, 64)
    if "swin" in name:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # additions of transformers are reached by no module
            student = quantize(model, residual=residual)
    else:
        student = quantize(model, residual=residual)
    stages = Anatomy.of(student).stages
    assert list(readers(student, image, stages).values()) == layers
    for network in (model, student):
        assert before_pooling(network, Anatomy.of(network).head, image) == pooled
    # By hand: the layer takes what the stage gives, number for number, and the pooled module's mean is the feature.
    seen: dict[str, Tensor] = {}
    for stage in (*stages, pooled):
        student.get_submodule(stage).register_forward_hook(lambda m, a, o, n=stage: seen.__setitem__(n, o.clone()))
    for layer in (*filter(None, layers), Anatomy.of(student).head):
        student.get_submodule(layer).register_forward_pre_hook(lambda m, a, n=layer: seen.__setitem__(n, a[0].clone()))
    with torch.no_grad():
        student.eval()(image)
    assert all(torch.equal(seen[s], seen[layer]) for s, layer in zip(stages, layers, strict=True) if layer)
    mean = seen[pooled].mean((1, 2) if "swin" in name else (2, 3))
    torch.testing.assert_close(mean, seen[Anatomy.of(student).head], rtol=0.02, atol=0.02)


def test_a_head_without_pooling_has_no_map_before_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    with pytest.raises(ValueError, match=r"gives a map with the 144 channels .*pooled=True"):
        before_pooling(model, "3", torch.randn(2, 3, 8, 8))
