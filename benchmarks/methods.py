r"""Does each mechanism earn its place? Binary ResNet-20 on CIFAR-10: every method against plain training and its rival.

A 1/1 network has room for a method to show. All arms have double shortcuts and PReLU (Bi-Real; DGRL's branch comes on
top where an arm has it), 8-bit first and last layer, the same float start and teacher, AdamW with cosine, batch 128,
the same batches (paired seeds) and the same number of trained passes: a recipe that trains two networks takes half the
steps, QFD's teacher phase and the stages of two-stage are counted in.

The size was fixed before the first final run: one epoch, three seeds, at most five trials an arm of one epoch each.
(The first plan said two epochs; they were cut to one before any test image was read, because a trial took six minutes
of the machine that it shared and not one and a half.)

Tuning happens on 5,000 training images that neither the float network of the trials (trained here, on the other 45,000)
nor the students see: first the learning rate, by plain training alone; then each arm's own grid at that rate. The final
runs start from the pretrained network and read the test images.

    python benchmarks/methods.py tune              # everything that is missing
    python benchmarks/methods.py tune --arms ftl   # two processes may work at once on different arms
    python benchmarks/methods.py final --seeds 0   # or on different seeds
    python benchmarks/methods.py table

Runs lie in runs/methods and are not repeated; the numbers are in benchmarks/results/methods-tuning.json and
methods-w1a1.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewbits.commands.bits import Bits
from fewbits.commands.compare import JSON, MARKDOWN, Compare, compare
from fewbits.commands.train import Train, train
from fewbits.training import Settings
from fewbits.training.folder import STUDENT

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/methods")
FLOAT = RUNS / "float-45000"
HELD_OUT = 5000
FLOAT_EPOCHS, TRIAL_EPOCHS, EPOCHS = 12, 1, 1
RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 100
BITS = Bits(1, 1, quantizer="bireal", blocks="bireal+prelu")


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        recipe: as ``--recipe`` takes it.
        question: what the row answers, and against which other row.
        grid: the options that are tried, at most five; empty where there is nothing to choose.
        fixed: options of all trials.
    """

    recipe: str
    question: str
    grid: tuple[tuple[str, ...], ...] = ()
    fixed: tuple[str, ...] = ()


def _weights(*values: float, name: str = "weight") -> tuple[tuple[str, ...], ...]:
    return tuple((f"{name}={value:g}",) for value in values)


ARMS: dict[str, Arm] = {
    "plain": Arm("plain", "the baseline"),
    "logits": Arm(
        "logits",
        "rival of everything that distils",
        (
            ("weight=0.5", "temperature=1", "labels=0.5"),
            ("weight=0.5", "temperature=4", "labels=0.5"),
            ("weight=0.9", "temperature=4", "labels=0.1"),
            ("weight=0.9", "temperature=8", "labels=0.1"),
        ),
    ),
    "features": Arm("features", "rival of qfd: the float feature", _weights(0.05, 0.5, 2)),
    "qfd": Arm("qfd", "the quantized feature, against features", _weights(0.05, 0.5, 2)),
    "ftl": Arm(
        "ftl",
        "centred cosine on three stages, against ftl-l2",
        (*_weights(1, 10, 30, 100), ("weight=30", "side=input")),
    ),
    "ftl-l2": Arm(
        "ftl", "rival of ftl: the same taps, squared error", _weights(0.1, 1, 10, 100, 1000), ("distance=l2",)
    ),
    "joint": Arm("joint", "the teacher trained along, against joint-frozen", _weights(5, 50, 500, name="gamma")),
    "joint-frozen": Arm(
        "joint",
        "rival of joint: its terms, teacher frozen",
        _weights(5, 50, 500, name="gamma"),
        ("train_teacher=false",),
    ),
    "two-stage": Arm("two-stage", "weights first, against plain", _weights(0.25, 0.5, name="share")),
    "stochastic": Arm("stochastic", "random blocks, against plain", _weights(0.25, 0.5, name="delta")),
    "blocks": Arm(
        "blockwise",
        "block losses without branch, against plain and ftl-l2",
        _weights(0.1, 1, 10, name="beta"),
        ("branch=null", "stages=one"),
    ),
    "branch": Arm("blockwise", "branch without block losses, against plain", fixed=("beta=0", "stages=one")),
    "blockwise": Arm(
        "blockwise", "DGRL: both, against blocks and branch", _weights(0.1, 1, 10, name="beta"), ("stages=one",)
    ),
}

COMBINATIONS: tuple[tuple[str, ...], ...] = (
    ("ftl", "logits"),
    ("logits", "blocks"),
    ("logits", "blockwise"),
)
"""Candidates for the best recipe of all parts, each part with the options that served it best alone. Chosen when the
trials of blocks and blockwise had come out best, before any combination was tried and any test image read."""


def settings(epochs: float, lr: float) -> Settings:
    """What all runs share."""
    return Settings(epochs=epochs, lr=lr, optimizer="adamw", compile=True, tensorboard=False, gradient_shares=9)


def base(output: Path, epochs: float, lr: float) -> Compare:
    """What all comparisons share."""
    return Compare(
        model="resnet20",
        data="cifar10",
        bits=BITS,
        budget="passes",
        output=output,
        progress=False,
        settings=settings(epochs, lr),
    )


def train_float(model: str = "resnet20", folder: Path = FLOAT) -> None:
    """The trials' start and teacher, from 45,000 images."""
    if not (folder / STUDENT).exists():
        rates = Settings(epochs=FLOAT_EPOCHS, lr=0.1, weight_decay=5e-4, compile=True, tensorboard=False)
        train(
            Train(
                model,
                "cifar10",
                recipe="float",
                hold_out=HELD_OUT,
                output=folder,
                resume=True,
                progress=False,
                settings=rates,
            )
        )


def trials(name: str, recipe: str, grid: Sequence[tuple[str, ...]], lr: float) -> dict[str, float]:
    """The held-out accuracy of each entry of a grid, by its options."""
    entries = {f"{name}.{index}": options for index, options in enumerate(grid)}
    config = base(RUNS / "tune" / f"{name}-lr{lr:g}", TRIAL_EPOCHS, lr)
    found = compare(
        replace(
            config,
            recipes=tuple(f"{label}={recipe}" for label in entries),
            options=tuple(f"{label}:{option}" for label, options in entries.items() for option in options),
            teacher=FLOAT,
            hold_out=HELD_OUT,
            seeds=1,
            settings=replace(config.settings, seed=TUNING_SEED, gradient_shares=3),
        )
    )
    return {" ".join(entries[row.name]): row.last.mean for row in found if row.last is not None}


def best(accuracies: dict[str, float]) -> str:
    """The first of the best."""
    return max(accuracies, key=lambda options: accuracies[options])


def tune(arms: Sequence[str], combine: bool) -> None:
    """Run the trials of ``arms`` that are missing, and write down what each reached."""
    train_float()
    rates = {f"{lr:g}": trials("plain", "plain", [()], lr)[""] for lr in RATES}
    note("rate", rates)
    lr = float(best(rates))
    for name in arms:
        if ARMS[name].grid:
            grid = [(*ARMS[name].fixed, *options) for options in ARMS[name].grid]
            note(name, trials(name, ARMS[name].recipe, grid, lr))
    for parts in COMBINATIONS if combine else ():
        recipe, options = combined(parts)
        note("+".join(parts), trials("+".join(parts), recipe, [options], lr))


def combined(parts: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The recipe and the options of a sum of arms."""
    options = [f"{ARMS[part].recipe}.{option}" for part in parts for option in chosen(part)]
    return "+".join(ARMS[part].recipe for part in parts), tuple(options)


def tuned() -> dict[str, dict[str, float]]:
    """The trials so far: by arm, the held-out accuracy of each choice."""
    path = RESULTS / "methods-tuning.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def note(name: str, accuracies: dict[str, float]) -> None:
    """Add an arm's trials to the file."""
    (RESULTS / "methods-tuning.json").write_text(json.dumps(tuned() | {name: accuracies}, indent=2) + "\n")
    print(name, {options: round(100 * accuracy, 2) for options, accuracy in accuracies.items()}, flush=True)


def chosen(name: str) -> tuple[str, ...]:
    """The options that an arm runs with at last.

    Raises:
        SystemExit: it was not tuned.
    """
    arm = ARMS[name]
    if not arm.grid:
        return arm.fixed
    if name not in tuned():
        raise SystemExit(f"{name} has not been tuned; run: python benchmarks/methods.py tune --arms {name}")
    return tuple(best(tuned()[name]).split())


def final(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Train the arms with what was chosen, on all training images; the test images are read once a run and epoch."""
    contenders = {name: (ARMS[name].recipe, chosen(name)) for name in arms}
    sums = {name: accuracies for name, accuracies in tuned().items() if "+" in name}
    if sums:
        name = max(sums, key=lambda parts: max(sums[parts].values()))
        contenders[name] = combined(name.split("+"))
    config = base(RUNS / "final", EPOCHS, float(best(tuned()["rate"])))
    config = replace(
        config,
        recipes=tuple(f"{label}={recipe}" for label, (recipe, _) in contenders.items()),
        options=tuple(f"{label}:{option}" for label, (_, options) in contenders.items() for option in options),
    )
    for seed in seeds:
        compare(replace(config, seeds=1, settings=replace(config.settings, seed=seed)))
    compare(replace(config, seeds=len(seeds), settings=replace(config.settings, seed=min(seeds))))
    keep()


def keep() -> None:
    """Copy the finished comparison from the runs to the results."""
    described: dict[str, Any] = json.loads((RUNS / "final" / JSON).read_text())
    (RESULTS / "methods-w1a1.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    (RESULTS / "methods-w1a1.md").write_text((RUNS / "final" / MARKDOWN).read_text())


def main() -> None:
    """Run what is missing of what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tune", "final", "table"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "the run diverged")  # said by the numbers
    if arguments.part == "tune":
        tune(arguments.arms, combine=arguments.arms == list(ARMS))
    elif arguments.part == "final":
        final(arguments.arms, arguments.seeds)
    else:
        print((RESULTS / "methods-w1a1.md").read_text())


if __name__ == "__main__":
    main()
