"""``fewbits demo``: the main job on embedded real data, in minutes: quantize, teach, ship."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from ..training import Settings
from .bench import Bench, bench
from .bits import Bits
from .runs import run_result
from .ship import Export, export
from .show import Report, Summary, report, summary
from .train import Train, train


@dataclass(frozen=True)
class Demo:
    """Train a float teacher on scikit-learn's handwritten digits, then 2-bit students; export, measure, report.

    Args:
        output: folder for the runs and the page; a demo that is there is replaced.
        epochs: of each network.
        seed: of everything.
    """

    output: Path = Path("runs/demo")
    epochs: float = 12
    seed: int = 0


def demo(config: Demo) -> Path:
    """Carry out ``config``; returns the page."""
    console = Console()
    if config.output.exists():
        if not (config.output / "float").exists() and any(config.output.iterdir()):
            raise ValueError(f"output folder {config.output} is not empty and holds no demo; choose another folder")
        shutil.rmtree(config.output)
    # On 8 x 8 images a second thread mostly waits for the first one.
    torch.set_num_threads(1)
    settings = Settings(epochs=config.epochs, batch_size=64, lr=0.1, seed=config.seed, warmup_steps=20)
    teacher = Train("resnet20", "digits", recipe="float", output=config.output / "float", settings=settings)
    student = Train(
        "resnet20",
        "digits",
        bits=Bits(weights=2, activations=2),
        teacher=config.output / "float",
        settings=replace(settings, lr=0.05),
    )
    console.rule("1. train a float teacher")
    train(teacher)
    console.rule("2. a 2-bit student, plain quantization-aware training")
    train(replace(student, recipe="plain", output=config.output / "plain"))
    console.rule("3. a 2-bit student, taught by QFD")
    # Digits: 64 features whose squares sum to hundreds; with the sum the term would drown the labels.
    train(replace(student, recipe="qfd", options=("reduction=mean",), output=config.output / "qfd"))
    runs = [config.output / name for name in ("float", "plain", "qfd")]
    console.rule("4. ship: export bit-packed, compare with PyTorch, measure beside float")
    for run in runs:
        export(Export(run))
    for run in runs[1:]:
        bench(Bench(run, threads=(1,), memory=False))
    summary(Summary(runs[-1]))
    console.rule("5. report")
    page = report(Report(tuple(runs), config.output / "report.html"))
    best = max(run_result(run)["accuracy"] for run in runs[1:])
    console.print(f"The better 2-bit student reaches {100 * best:.2f} %. Open {page} in a browser.", highlight=False)
    return page
