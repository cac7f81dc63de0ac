"""Checkpointed blocks: the same run to the bit, less memory, and networks that come out as they went in."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_worker import part_of_digits, records

import fewbits as fb
from fewbits.recipes import make
from fewbits.training import fit
from fewbits.training.activations import CheckpointedBlocks


def nets(channels: int = 3) -> tuple[nn.Module, nn.Module]:
    """A student and its teacher."""
    torch.manual_seed(0)
    teacher = fb.models.build("resnet20", num_classes=10, channels=channels)
    student = fb.quantize(teacher, 4, 4)
    return student, teacher


def train(folder: Path, recipe: str, **settings: Any) -> nn.Module:
    student, teacher = nets(1)
    chosen = {"epochs": 0.5, "batch_size": 16, "device": "cpu", "tensorboard": False, "bn_batches": 1, **settings}
    needs = make(recipe).teacher.needs_teacher
    data = part_of_digits()
    fit(student, teacher if needs else None, recipe=make(recipe), data=data, output=folder, progress=False, **chosen)
    return student


@pytest.mark.parametrize("recipe", ["plain", "features", "joint"])
def test_the_same_run_to_the_bit(recipe: str, tmp_path: Path):
    train(tmp_path / "kept", recipe, accumulate=2)
    student = train(tmp_path / "again", recipe, accumulate=2, checkpoint_blocks=True)
    assert records(tmp_path / "kept") == records(tmp_path / "again")
    for file in (tmp_path / "kept").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert not any("forward" in module.__dict__ for module in student.modules())
    copy.deepcopy(student)


def test_blocks_keep_their_input_alone():
    kept = {}
    images, labels = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    for on in (False, True):
        student, _ = nets()
        objective = make("plain").objective(student, None, batches=[images])
        blocks = CheckpointedBlocks(objective) if on else None
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = objective(images, labels)
        kept[on] = sum(seen.values())
        losses.total.backward()
        if blocks is not None:
            blocks.undo()
    assert kept[True] < 0.5 * kept[False]


def test_dropout_and_batch_norm_in_a_block():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.norm(self.conv(x)))

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Block(), Block()))
    net = nn.Sequential()
    net.stem, net.layer1 = layer[0], layer[1]
    net.pool, net.flat, net.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    found = []
    for on in (False, True):
        model = copy.deepcopy(net)
        objective = make("float").objective(model, None, batches=[images])
        blocks = CheckpointedBlocks(objective) if on else None
        torch.manual_seed(1)
        objective(images, labels).total.backward()
        if blocks is not None:
            blocks.undo()
        grads = [p.grad for p in model.parameters()]
        found.append([*grads, *model.buffers()])
    for given, wanted in zip(*found, strict=True):
        assert torch.equal(given, wanted)


def test_no_blocks_is_an_error():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    objective = make("float").objective(net, None, batches=[torch.randn(2, 3, 6, 6)])
    with pytest.raises(ValueError, match="none were found in the student"):
        CheckpointedBlocks(objective)


def test_not_with_compile():
    with pytest.raises(ValueError, match="leave out one of the two"):
        fb.training.Settings(checkpoint_blocks=True, compile=True)
