r"""What a training step has to keep in memory, counted: tensors that autograd saves between forward and backward.

Counts do not depend on the machine: they say what a GPU needs for a batch, before anybody has one. Storage that several
operators share counts once; parameters do not count. bf16 is autocast's.

    python benchmarks/saved_bytes.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fewbits as fb

NETWORKS = {"timm:resnet18": 1000, "timm:resnet50": 1000, "timm:vit_tiny_patch16_224": 1000}
SIZE, IMAGES = 224, 2


def saved_bytes(objective: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = objective(images, labels).total
    kept = sum(seen.values())
    del total
    return kept


def main() -> None:
    """Print a table."""
    print("| network | parameters | step | MB an image, fp32 | MB an image, bf16 |\n|---|---|---|---|---|")
    torch.manual_seed(0)
    images, labels = torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(10, (IMAGES,))
    for name, classes in NETWORKS.items():
        model = fb.models.build(name, num_classes=classes, image_size=SIZE)
        count = sum(parameter.numel() for parameter in model.parameters())
        students = {
            "float": (model, "float"),
            "4/4": (fb.quantize(model, 4, 4), "plain"),
            "4/4, shortcuts float": (fb.quantize(model, 4, 4, residual=None), "plain"),
            "4/4 under a teacher": (fb.quantize(model, 4, 4), "logits"),
        }
        for step, (student, recipe) in students.items():
            teacher = fb.models.build(name, num_classes=classes, image_size=SIZE) if recipe == "logits" else None
            objective = fb.recipes.make(recipe).objective(student, teacher, batches=[images])
            kept = [saved_bytes(objective, images, labels, bf16=bf16) / IMAGES for bf16 in (False, True)]
            objective.close()
            print(f"| {name} | {count:,} | {step} | {kept[0] / 1e6:.1f} | {kept[1] / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
