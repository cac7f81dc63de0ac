"""The house recipe against explicit loops, with and without binary blocks."""

import pytest
import torch
from torch import Tensor

from fewbits.blocks import bireal
from fewbits.convert import quantize
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.recipes import Best


@pytest.mark.parametrize("bits", [1, 4])
def test_the_loss_is_labels_and_blocks(bits: int):
    torch.manual_seed(0)
    teacher = CifarResNet((1, 1), (4, 8), projection=True, num_classes=3, architecture="tiny").eval()
    start = bireal(teacher, "prelu", "bottleneck") if bits == 1 else teacher
    student = quantize(start, bits, bits)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    objective = Best(beta=3.0).objective(student, teacher, batches=[images])
    student.eval()
    seen: dict[str, Tensor] = {}
    for name in ("layer1.0", "layer2.0"):
        for key, network in (("student", student), ("teacher", teacher)):
            network.get_submodule(name).register_forward_hook(
                lambda module, args, out, key=f"{key} {name}": seen.__setitem__(key, out.detach())
            )
    losses = objective(images, labels)
    expected = 0.0
    for probabilities, label in zip(student(images).softmax(1), labels, strict=True):
        expected -= probabilities[label].log().item() / len(labels)
    for name in ("layer1.0", "layer2.0"):
        mine, theirs = seen[f"student {name}"].flatten(), seen[f"teacher {name}"].flatten()
        expected += 3.0 * sum((a - b) ** 2 for a, b in zip(mine.tolist(), theirs.tolist(), strict=True)) / len(mine)
    assert losses.total.item() == pytest.approx(expected, rel=1e-4)
