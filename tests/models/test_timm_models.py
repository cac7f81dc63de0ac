"""Networks of timm by name. The tests skip where timm is not installed; none of them needs a network."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbits.convert import quantize
from fewbits.layers import QuantLinear
from fewbits.models import adapt, build, pretrained, timm_models

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
    reason='timm is not installed: pip install "fewbits[timm]"',
)


@needs_timm
@pytest.mark.parametrize(("name", "channels", "size"), [("resnet10t", 1, 64), ("vit_tiny_patch16_224", 3, 32)])
def test_building(name, channels, size):
    model = build(f"timm:{name}", num_classes=5, channels=channels, image_size=size).eval()
    with torch.no_grad():
        assert model(torch.rand(2, channels, size, size)).shape == (2, 5)
    assert model.architecture == f"timm:{name}"


@needs_timm
def test_layers_of_timm_s_own_that_are_plain_ones_are_quantized():
    """Found: the classifiers of MobileNetV3, LCNet and GhostNet stayed float, for timm has a Linear of its own."""
    student = quantize(build("timm:lcnet_050", num_classes=5), 4, 4)
    assert isinstance(student.classifier, QuantLinear)
    assert student.classifier.weight_quantizer.bits == 8  # it is the last layer
    assert student.conv_head.weight_quantizer.bits == 4


@needs_timm
def test_adapting_the_classifier():
    source, target = build("timm:resnet10t", num_classes=5), build("timm:resnet10t", num_classes=3)
    assert adapt(target, source.state_dict()) == ["fc.weight", "fc.bias"]


@needs_timm
def test_a_wrong_name_lists_close_ones():
    with pytest.raises(
        ValueError, match=r"model must be one that timm knows, got timm:resnet8; did you mean .*resnet18"
    ):
        build("timm:resnet8", num_classes=5)
    with pytest.raises(ValueError, match="timm knows"):
        pretrained("timm:resnet8", "cifar10")


@needs_timm
def test_a_network_that_timm_cannot_build():
    with pytest.raises(ValueError, match=r"timm:vit_tiny_patch16_224 cannot be built for 5 classes, -1 channels"):
        timm_models.build_timm("vit_tiny_patch16_224", num_classes=5, channels=-1)


@needs_timm
def test_pretrained_weights_that_cannot_be_fetched(monkeypatch):
    timm = timm_models.import_timm()

    def no_network(name, **options):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"timm:resnet10t could not be fetched \(ConnectionError: name or service"):
        pretrained("timm:resnet10t", "cifar10")


@needs_timm
def test_pretrained_weights(monkeypatch):
    timm = timm_models.import_timm()
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    before = torch.get_rng_state()
    found = pretrained("timm:resnet10t", "cifar10")
    assert found is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0]["fc.weight"].shape == (1000, 512)
    assert found[1].mean == (0.485, 0.456, 0.406)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r'pip install "fewbits\[timm\]"'):
        build("timm:resnet18", num_classes=10)


@needs_timm
def test_the_work_around_is_said_once():
    source = str(Path(timm_models.__file__).parents[2])
    code = f"""
import sys; sys.path.insert(0, {source!r})
from fewbits.data.torchvision_import import import_torchvision
import_torchvision(); import_torchvision()
import torchvision.models; torchvision.models.resnet18()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torchvision does not match torch") in (0, 1)
