r"""Is DGRL's branch worth its bits? A network widened to as many bits, instead of the branch.

The control of the method's page: beside each binary convolution the branch adds float weights, so a binary ResNet-20
with it takes 3.2 times the bytes of one without. Here the rival is a binary ResNet-20 of WIDTH, which takes as many
bytes without a branch, trained plainly and with the block losses. Its float network (start and teacher) is trained as
long and on the same 45,000 images as the narrow one's, everything else is as in the trials of ``methods.py``: the rate
that plain training chose, the strength that each arm chose there, one epoch, one seed, accuracy on the 5,000 held-out
training images. One seed and no test image: an answer about tens of points, not about one.

    python benchmarks/methods.py tune      # the narrow arms, and their float network
    python benchmarks/widened.py

Numbers go to benchmarks/results/widened.json; runs lie in runs/methods and are not repeated.
"""

from __future__ import annotations

import json
from dataclasses import replace

import methods
import torch

import fewbits as fb
from fewbits.commands.compare import compare
from fewbits.runs import with_blocks

RESULTS = methods.RESULTS / "widened.json"
WIDTH = 1.95
WIDE = f"resnet20-w{WIDTH:g}"
ROWS = {
    "plain": ("resnet20", "plain"),
    "branch": ("resnet20", "branch"),
    "blocks": ("resnet20", "blocks"),
    "blockwise": ("resnet20", "blockwise"),
    "plain, widened": (WIDE, "plain"),
    "blocks, widened": (WIDE, "blocks"),
}


def num_bytes(model: str, blocks: str) -> int:
    """What a student's plan takes, by ``fewbits.summarize``."""
    student = fb.quantize(
        with_blocks(fb.models.build(model, num_classes=10), blocks), plan=replace(methods.BITS, blocks=blocks).plan()
    )
    example = torch.randn(2, 3, 32, 32)
    fb.calibrate(student, [example])
    return fb.summarize(student, example).totals.size_bytes


def trial(model: str, arm: str) -> float:
    """The held-out accuracy of an arm with what it chose at width one."""
    lr = float(methods.best(methods.tuned()["rate"]))
    folder = methods.FLOAT if model == "resnet20" else methods.RUNS / f"float-45000-{model}"
    methods.train_float(model, folder)
    options = methods.chosen(arm)
    config = replace(
        methods.base(methods.RUNS / "widened" / f"{model}-{arm}", methods.TRIAL_EPOCHS, lr),
        model=model,
        recipes=(f"{arm}={methods.ARMS[arm].recipe}",),
        options=tuple(f"{arm}:{option}" for option in options),
        teacher=folder,
        hold_out=methods.HELD_OUT,
        seeds=1,
    )
    (row,) = compare(replace(config, settings=replace(config.settings, seed=methods.TUNING_SEED, gradient_shares=0)))
    assert row.last is not None
    return row.last.mean


def main() -> None:
    """Run what is missing, write down and print."""
    torch.manual_seed(0)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (model, arm) in ROWS.items():
        if name in found:
            continue
        blocks = "bireal+prelu" + ("+bottleneck" if arm in ("branch", "blockwise") else "")
        found[name] = {
            "model": model,
            "arm": arm,
            "bytes": num_bytes(model, blocks),
            "held_out_accuracy": trial(model, arm),
            "options": list(methods.chosen(arm)),
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name:>16}: {row['bytes']:>8,} bytes, {100 * row['held_out_accuracy']:.2f} % of the held-out images")


if __name__ == "__main__":
    main()
