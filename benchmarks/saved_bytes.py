r"""What a training step keeps in memory between forward and backward, counted.

Counts do not depend on the machine: they say what a GPU needs for a batch, before anybody has one. Parameters do not
count. bf16 is autocast's. Steps are ``fit``'s: eager, with ``--no-recompute``, and with ``--compile`` (channels-last)
as on a GPU; on a processor that keeps what was cast to bf16.

    python benchmarks/saved_bytes.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fewbits as fb
from fewbits.distill import Objective
from fewbits.quantizers.again import QuantizingAgain
from fewbits.quantizers.gates import promised_open
from fewbits.training.compiling import compiled
from fewbits.training.rectifiers import find, rectified_by_quantizers

NETWORKS = {"timm:resnet18": 1000, "timm:resnet50": 1000, "timm:vit_tiny_patch16_224": 1000}
SIZE, IMAGES = 224, 8


@contextmanager
def as_in_a_step(objective: Objective, compiles: bool, recompute: bool) -> Iterator[None]:
    """What ``fit``'s steps do around a forward pass."""
    student = objective.networks.student
    again = recompute and not compiles  # what a compiled graph keeps is its own business
    with (
        promised_open(student) if compiles else rectified_by_quantizers(find(student)),
        QuantizingAgain() if again else nullcontext(),
    ):
        yield


def saved_bytes(run: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool) -> int:
    """Bytes that a forward pass leaves taken."""
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        total = run(images, labels).total
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
            compiles, run, pixels = "compiled" in step, objective, images
            if compiles:
                torch._dynamo.reset()
                run = compiled(objective.to(memory_format=torch.channels_last))
                pixels = images.contiguous(memory_format=torch.channels_last)
            kept = {}
            for bf16 in (False, True, False, True):  # the first time each compiles
                with as_in_a_step(objective, compiles, recompute="nothing recomputed" not in step):
                    kept[bf16] = saved_bytes(run, pixels, labels, bf16=bf16) / IMAGES / 1e6
            objective.close()
            print(f"| {name} | {count:,} | {step} | {kept[False]:.1f} | {kept[True]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
