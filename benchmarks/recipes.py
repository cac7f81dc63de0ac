"""ResNet-20 on CIFAR-10: plain against logit, float-feature and quantized-feature distillation, equal budgets.

Every arm starts from the same pretrained weights, sees the same batches (paired seeds), takes the same number of
optimizer steps (QFD's teacher phase counted in), the same rate and schedule; the distillation arms have the same
teacher. Losses keep their default weights: nothing here was tuned, because the pretrained network has seen the whole
training set and nothing can be held out from it.

    python benchmarks/recipes.py --bits 2 --seeds 0 1 2 --epochs 1

Each finished run is one line in benchmarks/results/recipes-wBaB.json; runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fewbits as fb

RESULTS = Path(__file__).parent / "results"
ARMS = ("plain", "logits", "features", "qfd")


def run(bits: int, arm: str, seed: int, epochs: float, lr: float) -> dict[str, Any]:
    """Train one student and return what it reached."""
    torch.manual_seed(seed)
    data = fb.data.load("cifar10")
    own = fb.models.pretrained("resnet20", "cifar10")
    if own is None:
        raise SystemExit("the pretrained ResNet-20 is missing; set FEWBITS_DATA")
    state, normalisation = own
    teacher = fb.models.build("resnet20", num_classes=10)
    fb.models.load_into(teacher, state, what="the pretrained ResNet-20")
    student = fb.quantize(teacher, weights=bits, activations=bits)
    started = time.monotonic()
    result = fb.fit(
        student,
        teacher,
        recipe=fb.recipes.make(arm),
        data=data,
        normalisation=normalisation,
        epochs=epochs,
        lr=lr,
        seed=seed,
        compile=True,
        progress=False,
    )
    return {
        "bits": bits,
        "arm": arm,
        "seed": seed,
        "epochs": epochs,
        "lr": lr,
        "last": result.accuracy,
        "best": result.best_accuracy,
        "seconds": round(time.monotonic() - started, 1),
        "skipped_steps": result.skipped_steps,
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def commit() -> str:
    """The checkout's commit, short."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()


def load() -> list[dict[str, Any]]:
    """The runs so far."""
    return [row for path in sorted(RESULTS.glob("recipes-*.json")) for row in json.loads(path.read_text())]


def save(row: dict[str, Any]) -> None:
    """Add one run to the file of its bits."""
    bits = row["bits"]
    rows = [*(r for r in load() if r["bits"] == bits), row]
    (RESULTS / f"recipes-w{bits}a{bits}.json").write_text(
        "[\n" + ",\n".join("  " + json.dumps(r, sort_keys=True) for r in rows) + "\n]\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation of the last epoch, and the paired difference to plain, in Markdown."""
    lines = [
        "| W/A | epochs | recipe | seeds | last epoch, % | best, % | minus plain, points |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(r["bits"], r["epochs"]) for r in rows}, reverse=True)
    for bits, epochs in keys:
        of = {
            arm: {r["seed"]: r for r in rows if (r["bits"], r["epochs"], r["arm"]) == (bits, epochs, arm)}
            for arm in ARMS
        }
        for arm in ARMS:
            runs = of[arm]
            if not runs:
                continue
            pairs = [100 * (r["last"] - of["plain"][s]["last"]) for s, r in runs.items() if s in of["plain"]]
            difference = "" if arm == "plain" or not pairs else spread(pairs, sign=True)
            last, best = (spread([100 * r[k] for r in runs.values()]) for k in ("last", "best"))
            lines.append(f"| {bits}/{bits} | {epochs:g} | {arm} | {len(runs)} | {last} | {best} | {difference} |")
    return "\n".join(lines)


def spread(values: list[float], sign: bool = False) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.mean(values):+.2f}" if sign else f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--table", action="store_true", help="print the table of what is there and stop")
    arguments = parser.parse_args()
    for seed in [] if arguments.table else arguments.seeds:
        for bits in arguments.bits:
            for arm in arguments.arms:
                key = (bits, arm, seed, arguments.epochs, arguments.lr)
                if key not in {(r["bits"], r["arm"], r["seed"], r["epochs"], r["lr"]) for r in load()}:
                    row = run(bits, arm, seed, arguments.epochs, arguments.lr)
                    save(row)
                    print(json.dumps(row), flush=True)
    print(table(load()))


if __name__ == "__main__":
    main()
