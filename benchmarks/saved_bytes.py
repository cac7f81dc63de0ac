r"""What a training step keeps in memory between forward and backward, counted.

Counts do not depend on the machine: they say what a GPU needs for a batch, before anybody has one. Parameters do not
count. bf16 is autocast's. Steps are ``fit``'s: eager, with ``--no-recompute``, and with ``--compile`` (channels-last).

    python benchmarks/saved_bytes.py
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fewbits as fb
from fewbits.quantizers.again import QuantizingAgain
from fewbits.quantizers.gates import promised_open
from fewbits.training.compiling import compiled

NETWORKS = {"timm:resnet18": 1000, "timm:resnet50": 1000, "timm:vit_tiny_patch16_224": 1000}
SIZE, IMAGES = 224, 8


def saved_bytes(objective: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool, recompute: bool) -> int:
    """Bytes that a forward pass leaves taken."""
    with (
        promised_open(objective),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        QuantizingAgain() if recompute else nullcontext(),
    ):
        total = objective(images, labels).total
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
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
            "4/4, nothing recomputed": (fb.quantize(model, 4, 4), "plain"),
            "float, compiled": (model, "float"),
            "4/4, compiled": (fb.quantize(model, 4, 4), "plain"),
        }
        for step, (student, recipe) in students.items():
            teacher = fb.models.build(name, num_classes=classes, image_size=SIZE) if recipe == "logits" else None
            objective = fb.recipes.make(recipe).objective(student, teacher, batches=[images])
            ways = {"recompute": "nothing" not in step}
            kept = []
            for bf16 in (False, True):
                run, pixels = objective, images
                if "compiled" in step:
                    torch._dynamo.reset()
                    ways = {"recompute": False}  # that is the graph's own business
                    objective.to(memory_format=torch.channels_last)
                    run, pixels = compiled(objective), images.contiguous(memory_format=torch.channels_last)
                    saved_bytes(run, pixels, labels, bf16=bf16, **ways)
                kept.append(saved_bytes(run, pixels, labels, bf16=bf16, **ways) / IMAGES)
            objective.close()
            print(f"| {name} | {count:,} | {step} | {kept[0] / 1e6:.1f} | {kept[1] / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
