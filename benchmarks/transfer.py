r"""Transfer to little data: a ResNet-20 trained on CIFAR-100 becomes a 4-bit network for other classes.

Targets: CIFAR-10 and 17 Flowers (32 x 32 pixels) with 10, 30 or 60 training images of each class. Arms: plain
fine-tuning (l2), L2-SP, DELTA, alignment with uniform and with attentive weights, the KL on source classes alone, DTQ
with both, and the float network fine-tuned (float) for reference. All start from the same source network, take the same
number of optimizer steps on the same images (paired seeds; a seed also draws the training images), and use the min-max
quantizer; first and last layer and residual streams are at 8 bits (LSQ), so rows do not compare with the paper's.

Each arm has one strength, chosen on images that are neither trained on nor tested on (--tune: at 30 images of each
class, one seed), then frozen: the reference's way of one learning rate for all. For 60 flowers a class the images that
served for tuning are trained on. The test images are read by the final runs only; the last step is the headline.

    fewbits train --model resnet20 --data cifar100 --recipe float --epochs 12 --lr 0.1 --weight-decay 5e-4 \
        --compile --output runs/source-resnet20-cifar100
    python benchmarks/transfer.py --tune
    python benchmarks/transfer.py

Each finished run is one line in benchmarks/results/transfer-TARGET.json; runs that are there are not repeated. Two
processes may work at once on different --targets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import fewbits as fb
from fewbits.commands import load_run
from fewbits.data.flowers17 import read_part
from fewbits.training import TrainingError, read_metrics
from fewbits.training.checkpoint import load_checkpoint

RESULTS = Path(__file__).parent / "results"
MODEL, IMAGE_SIZE = "resnet20", 32
TARGETS = ("cifar10", "flowers17")
TUNED_AT, TUNING_SEED, HELD_OUT = 30, 100, 2000
GRIDS: dict[str, tuple[float, ...]] = {
    "float": (1e-4, 1e-3, 1e-2),  # weight decay
    "l2": (1e-4, 1e-3, 1e-2),
    "l2-sp": (1e-2, 1e-1, 1.0),
    # Gradients of about 0.2, 2 and 20 times the cross-entropy's at the start, from a ResNet-20 trained on CIFAR-10:
    "delta": (3e-4, 3e-3, 3e-2),
    "uniform": (1e-4, 1e-3, 1e-2),  # alpha; beta is 0
    "attentive": (1e-4, 1e-3, 1e-2),
    "kl": (0.1, 0.5, 2.0),  # beta; alpha is 0
    "dtq": (1e-4, 1e-3, 1e-2),  # alpha; beta is the paper's 0.5
}
BATCH_SIZES = (1, 10, 100, 500)
COMPOSITION_IMAGES = 1000


def recipe(arm: str, strength: float) -> fb.Recipe:
    """The arm's recipe; for float and l2 the strength is the run's weight decay."""
    recipes = fb.recipes
    made = {
        "float": recipes.Float,
        "l2": recipes.Plain,
        "l2-sp": lambda: recipes.L2SP(strength),
        "delta": lambda: recipes.DELTA(strength),
        "uniform": lambda: recipes.DTQ(alpha=strength, beta=0, attention=False),
        "attentive": lambda: recipes.DTQ(alpha=strength, beta=0),
        "kl": lambda: recipes.DTQ(alpha=0, beta=strength),
        "dtq": lambda: recipes.DTQ(alpha=strength),
    }
    return made[arm]()


def target(name: str, per_class: int, seed: int, tuning: bool) -> fb.data.Dataset:
    """The few training images, and what they are judged by: the test images, or while tuning others."""
    if name == "cifar10":
        data = fb.data.load(name)
        return (data.hold_out(HELD_OUT) if tuning else data).per_class(per_class, seed)
    data = fb.data.load(name, image_size=IMAGE_SIZE)
    folder = next(root / name for root in fb.data.roots() if (root / name / "split.csv").is_file())
    held = dataclasses.replace(read_part(folder, "val"), image_size=IMAGE_SIZE)
    if tuning:
        return dataclasses.replace(data, test=held).per_class(per_class, seed)
    if per_class * data.num_classes > data.train.num_samples:
        images, labels = (
            torch.cat([getattr(split, part) for split in (data.train, held)]) for part in ("images", "labels")
        )
        data = dataclasses.replace(data, train=fb.data.TensorSplit(images, labels, IMAGE_SIZE))
    return data.per_class(per_class, seed)


def run(arguments: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train one student and return what it reached; a strength that it does not survive reaches nothing."""
    try:
        return trained(arguments, key)
    except TrainingError as error:
        return key | {"last": 0.0, "best": 0.0, "stopped": str(error), "commit": commit()}


def trained(arguments: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train one student."""
    data = target(key["target"], key["per_class"], key["seed"], key["tuning"])
    source, normalisation = load_run(arguments.source)
    torch.manual_seed(key["seed"])
    student = fb.models.build(MODEL, num_classes=data.num_classes)
    fb.models.adapt(student, source.state_dict())
    chosen = recipe(key["arm"], key["strength"])
    if chosen.quantized:
        student = fb.quantize(student, key["bits"], key["bits"], quantizer="minmax")
    epochs = key["steps"] / (data.train.num_samples // arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the run diverged")  # said by the numbers
        result = fb.fit(
            student,
            source,
            recipe=chosen,
            data=data,
            normalisation=normalisation,
            output=folder,
            progress=False,
            epochs=epochs,
            batch_size=arguments.batch_size,
            lr=key["lr"],
            schedule="step",
            milestones=(0.67,),
            warmup_steps=0,
            weight_decay=key["strength"] if key["arm"] in ("float", "l2") else 0.0,
            evaluate_every=max(round(epochs / 2), 1),
            seed=key["seed"],
            gradient_shares=3,
            tensorboard=False,
        )
        shares = [record for record in read_metrics(Path(folder)) if record["event"] == "shares"]
        checkpoint = load_checkpoint(Path(folder) / "checkpoint")
    networks = checkpoint.part("networks") if checkpoint else {}
    return key | {
        "last": result.accuracy,
        "best": result.best_accuracy,
        "seconds": round(result.seconds, 1),
        "skipped_steps": result.skipped_steps,
        "shares": {
            name.removeprefix("share/"): [record[name] and round(record[name], 4) for record in shares]
            for name in (shares[0] if shares else {})
            if name.startswith("share/")
        },
        "entropy": [round(float(value), 4) for name, value in networks.items() if name.endswith(".entropy")],
        **({} if key["tuning"] or not chosen.quantized else compositions(result.student, data, normalisation)),
        "batch_size": arguments.batch_size,
        "source": source_accuracy(arguments.source),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def compositions(student: nn.Module, data: fb.data.Dataset, normalisation: fb.data.Normalisation) -> dict[str, Any]:
    """Accuracy of dynamic ranges by the test batch's size and make-up, and of frozen ones, on the first test images."""
    test = data.test.subset(torch.arange(min(COMPOSITION_IMAGES, data.test.num_samples)))
    by_class = test.subset(test.labels.argsort(stable=True))

    def reached(network: nn.Module, split: fb.data.Split, size: int, shuffle: bool) -> float:
        return fb.accuracy(network, split.batches(batch_size=size, normalisation=normalisation, shuffle=shuffle))

    frozen = fb.freeze_ranges(student, training_images(data, normalisation))
    return {
        "by_batch_size": {size: reached(student, test, size, shuffle=True) for size in BATCH_SIZES},
        "by_class_10": reached(student, by_class, 10, shuffle=False),
        "frozen": reached(frozen, test, BATCH_SIZES[-1], shuffle=False),
    }


def training_images(data: fb.data.Dataset, normalisation: fb.data.Normalisation) -> Iterator[Tensor]:
    """Batches of 64 of the training images, 512 at most."""
    batches = data.train.batches(batch_size=64, normalisation=normalisation, shuffle=True, drop_last=True)
    for _, (images, _labels) in zip(range(8), batches, strict=False):
        yield images


def source_accuracy(folder: Path) -> float:
    """What the source reached on the classes that it was trained on."""
    return float(read_metrics(folder)[-1]["accuracy"])


def commit() -> str:
    """The checkout's commit, short."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()


def load(results: Path, name: str) -> list[dict[str, Any]]:
    """The runs so far."""
    path = results / f"transfer-{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def save(results: Path, row: dict[str, Any]) -> None:
    """Add one run to the file of its target."""
    rows = [*load(results, row["target"]), row]
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"transfer-{row['target']}.json"
    path.write_text("[\n" + ",\n".join("  " + json.dumps(r, sort_keys=True) for r in rows) + "\n]\n")


def tuned(rows: list[dict[str, Any]], arm: str) -> float | None:
    """The strength with the best accuracy on the held-out images, the smaller one of equals; None without a trial."""
    trials = [row for row in rows if row["tuning"] and row["arm"] == arm]
    return min(trials, key=lambda row: (-row["last"], row["strength"]))["strength"] if trials else None


def keys(arguments: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """The runs that are asked for, in an order in which pairs come together."""
    same = {"target": name, "bits": arguments.bits, "steps": arguments.steps, "lr": arguments.lr}
    if arguments.tune:
        for arm in arguments.arms:
            for strength in GRIDS[arm]:
                yield same | {
                    "per_class": TUNED_AT,
                    "arm": arm,
                    "strength": strength,
                    "seed": TUNING_SEED,
                    "tuning": True,
                }
        return
    trials = matching(load(arguments.results, name), same)
    for seed in arguments.seeds:
        for per_class in arguments.per_class:
            for arm in arguments.arms:
                strength = tuned(trials, arm)
                if strength is None:
                    raise SystemExit(f"{arm} on {name} was not tuned for these steps, bits and rate; run --tune first")
                yield same | {"per_class": per_class, "arm": arm, "strength": strength, "seed": seed, "tuning": False}


def matching(rows: list[dict[str, Any]], key: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have everything of ``key``."""
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def table(arguments: argparse.Namespace, name: str) -> str:
    """Last step and best evaluation (mean and sample standard deviation), paired difference to l2, in Markdown."""
    same = {"target": name, "bits": arguments.bits, "steps": arguments.steps, "lr": arguments.lr, "tuning": False}
    rows = [row for row in matching(load(arguments.results, name), same) if row["seed"] in arguments.seeds]
    bits = arguments.bits
    lines = [
        f"{name}, {bits}/{bits}, {arguments.steps} steps",
        "",
        "| images a class | arm | strength | seeds | last, % | best, % | minus l2, points (95 %) "
        "| batches of 1 / 10 / 100, % | 10 of a class, % | frozen, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for per_class in sorted({row["per_class"] for row in rows}):
        of = {arm: {r["seed"]: r for r in rows if (r["arm"], r["per_class"]) == (arm, per_class)} for arm in GRIDS}
        for arm, runs in of.items():
            if not runs:
                continue
            pairs = [100 * (r["last"] - of["l2"][s]["last"]) for s, r in runs.items() if s in of["l2"]]
            last, best = (spread([100 * r[k] for r in runs.values()]) for k in ("last", "best"))
            sizes = [[r["by_batch_size"][str(s)] for r in runs.values() if "by_batch_size" in r] for s in (1, 10, 100)]
            others = [[r[k] for r in runs.values() if k in r] for k in ("by_class_10", "frozen")]
            by_size = " / ".join(mean(values) for values in sizes)
            strength = next(iter(runs.values()))["strength"]
            lines.append(
                f"| {per_class} | {arm} | {strength:g} | {len(runs)} | {last} | {best} "
                f"| {'' if arm == 'l2' else interval(pairs)} | {by_size} | {mean(others[0])} | {mean(others[1])} |"
            )
    return "\n".join([*lines, "", *asides(rows)])


def asides(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the table's means hide: arms against each other seed by seed, and what dynamic ranges do."""
    reached = {(row["per_class"], row["arm"], row["seed"]): 100 * row["last"] for row in rows}
    for one, two in (("uniform", "attentive"), ("dtq", "kl"), ("kl", "float")):
        for per_class in sorted({row["per_class"] for row in rows}):
            seeds = [s for n, arm, s in reached if (n, arm) == (per_class, one) and (n, two, s) in reached]
            pairs = [f"{reached[per_class, one, s] - reached[per_class, two, s]:+.2f}" for s in sorted(seeds)]
            yield f"{one} minus {two}, {per_class} images a class, seed by seed: {', '.join(pairs)}"
    dynamic = [row for row in rows if "frozen" in row]
    if dynamic:
        made_up = [[*row["by_batch_size"].values(), row["by_class_10"]] for row in dynamic]
        moved = [100 * (max(values) - min(values)) for values in made_up]
        cost = [100 * (statistics.mean(row["by_batch_size"].values()) - row["frozen"]) for row in dynamic]
        for what, values in (("the test batch's make-up moves accuracy by", moved), ("freezing ranges costs", cost)):
            middle, least, most = statistics.median(values), min(values), max(values)
            yield f"{what} {middle:.1f} points in the median of {len(values)} networks, {least:.1f} to {most:.1f}"


def mean(shares: list[float]) -> str:
    """In per cent; nothing for nothing."""
    return f"{100 * statistics.mean(shares):.1f}" if shares else "-"


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def interval(pairs: list[float]) -> str:
    """Mean of the paired differences, and half the width of its 95 % interval."""
    if len(pairs) < 2:
        return f"{pairs[0]:+.2f}" if pairs else ""
    half = stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.mean(pairs):+.2f} ± {half:.2f}"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--arms", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--per-class", type=int, nargs="+", default=[10, 30, 60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--source", type=Path, default=Path("runs/source-resnet20-cifar100"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder for rehearsals")
    parser.add_argument("--tune", action="store_true", help="try the strengths on held-out images")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and stop")
    arguments = parser.parse_args()
    for name in arguments.targets:
        for key in [] if arguments.table else keys(arguments, name):
            if not matching(load(arguments.results, name), key):
                row = run(arguments, key)
                save(arguments.results, row)
                print(json.dumps(row), flush=True)
        print(table(arguments, name))


if __name__ == "__main__":
    main()
