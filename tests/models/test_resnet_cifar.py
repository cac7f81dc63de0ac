"""Our own networks: sizes, names, tracing, and the pretrained weights' accuracy."""

import pytest
import torch
from torch import nn

from fewbits.data import load
from fewbits.models import MODELS, PRETRAINED, build, load_into, names, pretrained
from fewbits.models.resnet_cifar import PadShortcut

PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "vgg-small": 4_583_306,
}


def test_the_table_is_complete():
    assert set(PARAMETERS) == set(names()) == set(MODELS)
    assert set(PRETRAINED) <= set(MODELS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    assert sum(parameter.numel() for parameter in build(name, num_classes=10).parameters()) == PARAMETERS[name]


# ResNet-32 and ResNet-56 are ResNet-20 with more of the same blocks, which would only take time.
KINDS = ("resnet20", "resnet18", "vgg-small")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28)])
def test_any_data(name, channels, size):
    logits = build(name, num_classes=7, channels=channels)(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_tracing_and_export(name):
    model = build(name, num_classes=10).eval()
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(torch.fx.symbolic_trace(model)(images), expected)
        exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert torch.allclose(exported.module()(images), expected, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_every_relu_is_its_own_module(name):
    model = build(name, num_classes=10)
    calls: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.rand(2, 3, 8, 8))
    assert (
        len(calls)
        == len(set(calls))
        == sum(isinstance(m, nn.ReLU | nn.Conv2d | nn.BatchNorm2d) for m in model.modules())
    )


def test_building_is_decided_by_the_seed():
    torch.manual_seed(1)
    first = build("resnet20", num_classes=10).state_dict()
    torch.manual_seed(1)
    second = build("resnet20", num_classes=10).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shortcut_by_a_slow_loop():
    x = torch.rand(2, 4, 6, 6)
    out = PadShortcut(4, 8, 2)(x)
    for channel in range(8):
        expected = x[:, channel - 2, ::2, ::2] if 2 <= channel < 6 else torch.zeros(2, 3, 3)
        assert torch.equal(out[:, channel], expected)


def test_pretrained_accuracy(shared_data):
    found = pretrained("resnet20", "cifar10", shared_data)
    if found is None:
        pytest.skip(f"no pretrained-cifar10 in {shared_data}")
    state, normalisation = found
    model = build("resnet20", num_classes=10).eval()
    load_into(model, state, what="the pretrained file")
    thousand = load("cifar10", shared_data).test.subset(torch.arange(1000))
    with torch.inference_mode():
        correct = sum(
            int((model(images).argmax(1) == labels).sum())
            for images, labels in thousand.batches(batch_size=250, normalisation=normalisation)
        )
    assert 880 <= correct <= 950


def test_pretrained_resnet56_loads(shared_data):
    found = pretrained("resnet56", "cifar10", shared_data)
    if found is None:
        pytest.skip(f"no pretrained-cifar10 in {shared_data}")
    load_into(build("resnet56", num_classes=10), found[0], what="the pretrained file")


@pytest.mark.parametrize(("name", "data"), [("resnet20", "cifar100"), ("resnet18", "cifar10"), ("resnet20", "cifar10")])
def test_no_pretrained_weights(name, data, tmp_path):
    assert pretrained(name, data, tmp_path) is None


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet21", {"num_classes": 10}, "did you mean resnet"),
        ("unheard-of", {"num_classes": 10}, "must be one of resnet20, .*vgg-small, or timm:NAME, got 'unheard-of'"),
        ("resnet20", {"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ("resnet20", {"num_classes": 2, "channels": 0}, "channels must be at least 1, got 0"),
        ("resnet20", {"num_classes": 2, "image_size": 0}, "image_size must be at least 1 pixel, got 0"),
    ],
)
def test_bad_arguments(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, **options)


def test_pretrained_of_an_unknown_name():
    with pytest.raises(ValueError, match="model must be one of"):
        pretrained("resnet-20", "cifar10")
