"""Double-shortcut networks and their float branches, exported: the file computes what PyTorch computes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from fewbits import Rule
from fewbits.blocks import binary_blocks, bireal
from fewbits.deploy import export
from fewbits.models.resnet_cifar import CifarResNet

from .networks import CLASSES, images, student


@pytest.mark.parametrize("activation", ["none", "prelu"])
@pytest.mark.parametrize("branch", [None, "bottleneck", "squeeze", "grouped"])
def test_binary_blocks_are_exported_equal(branch: Any, activation: Any, tmp_path: Path):
    net = CifarResNet((1, 1), (8, 16), projection=False, num_classes=CLASSES, architecture="tiny")
    net = bireal(net, activation, branch)
    for block in binary_blocks(net):
        for part in (block.branch1, block.branch2):
            if part is not None:
                nn.init.normal_(part[-1].weight)  # type: ignore[index]
    trained = student(net, 1, 1, "bireal" if activation == "none" else "react")
    found = export(trained, tmp_path / "student.onnx", example=images(32), normalisation=None, minimum_equal=0.0)
    assert min(row.equal for row in found.codes) >= 0.999
    x = images(7)
    with torch.no_grad():
        wanted = trained(x).numpy()
    got = onnxruntime.InferenceSession(found.path).run(None, {"images": x.numpy()})[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    packed = {row.name for row in found.layers}
    assert packed == {"conv1", "linear"} | {f"layer{stage}.0.conv{conv}" for stage in (1, 2) for conv in (1, 2)}


def test_shortcuts_of_eight_bits_run_on_integers(tmp_path: Path):
    net = CifarResNet((1, 1), (8, 16), projection=True, num_classes=CLASSES, architecture="tiny")
    rules = [Rule("*.shortcut.conv", 8, 8, "lsq")]
    trained = student(bireal(net, "prelu", float_shortcut=False), 1, 1, "react", rules=rules)
    path = tmp_path / "student.xml"
    found = export(trained, path, example=images(32), normalisation=None, minimum_equal=0.0, engine="openvino")
    kernels = {row.name: row.kernel for row in found.layers}
    assert "I8" in kernels["layer2.0.shortcut.conv"]
    assert "u1" in kernels["layer2.0.conv1"]
