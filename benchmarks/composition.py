"""Every teaching with every schedule and every quantizer: trained, stopped, continued and exported to both engines.

A test does this for a few combinations in which each two choices meet; this is the whole product, once. What counts is
that each either works or is refused in one clear sentence when it is put together, never in the middle of a run.

The network is a ResNet of three blocks on 8 x 8 digits; accuracies mean nothing after so few steps.

    python benchmarks/composition.py

Finished combinations are in benchmarks/results/composition.json and not repeated.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import fewbits as fb
from fewbits.deploy import ParityError
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.quantizers import METHODS, start
from fewbits.training import loop

RESULTS = Path(__file__).parent / "results" / "composition.json"
TEACHING = ("plain", "logits", "features", "ftl", "qfd", "joint", "dtq", "l2-sp", "delta", "blockwise")
SCHEDULES = ("", "two-stage", "progressive", "stochastic", "two-stage+progressive")
BITS = 2
OPTIONS: dict[str, Any] = {"batch_size": 20, "lr": 0.01, "bn_batches": 1, "checkpoint_seconds": 0.0}


class Stopped(Exception):
    """Somebody pulled the plug."""


def network() -> nn.Module:
    """Small, with residual blocks."""
    torch.manual_seed(0)
    return CifarResNet((1, 1, 1), (8, 8, 16), False, num_classes=10, channels=1, architecture="resnet8")


def run(teaching: str, schedule: str, quantizer: str, data: fb.data.Dataset) -> dict[str, Any]:
    """What came of one combination."""
    teacher = network()
    bits = 1 if METHODS[quantizer].bits == (1,) else BITS
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe = fb.recipes.make("+".join(part for part in (teaching, schedule) if part))
            student = fb.quantize(teacher, bits, bits, quantizer=quantizer)
            options = OPTIONS | {
                "recipe": recipe,
                "data": data,
                "epochs": 2 * len(recipe.phases()),
                "tensorboard": False,
            }
            options |= {"output": Path(folder) / "run", "progress": False}
            # Two steps an epoch; pulled out in the last but one.
            stop_at = 4 * len(recipe.phases()) - 2
            after_step = loop.Loop._after_step

            def stop(self: Any, *args: Any) -> None:
                after_step(self, *args)
                if self.position.total_step == stop_at:
                    raise Stopped

            try:
                with patch.object(loop.Loop, "_after_step", stop):
                    fb.fit(fb.quantize(teacher, bits, bits, quantizer=quantizer), teacher, **options)
                return outcome("was not stopped", started)
            except Stopped:
                pass
            result = fb.fit(student, teacher, resume=True, **options)
        except ValueError as error:
            return outcome("refused", started, str(error))
        except Exception as error:  # what this program is looking for
            return outcome("failed", started, f"{type(error).__name__}: {error}")
        exports = {}
        for engine, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
            try:
                path = Path(folder) / f"student{suffix}"
                made = fb.export(result.student, path, example=data.pixels(40), engine=engine)
                exports[engine] = f"{sum(not layer.reason for layer in made.layers)} of {len(made.layers)} on integers"
            except ParityError as error:
                exports[engine] = f"refused: {error}"
            except Exception as error:  # likewise
                exports[engine] = f"failed: {type(error).__name__}: {error}"
    return outcome("trained", started) | exports


def outcome(what: str, started: float, why: str = "") -> dict[str, Any]:
    """A row without its key."""
    return {"outcome": what, "seconds": round(time.monotonic() - started, 1)} | ({"why": why[:300]} if why else {})


def main() -> None:
    """Run what is missing, then count."""
    warnings.simplefilter("ignore")
    # Where the grids start does not matter here, and the search for it takes most of the time.
    start.NUM_CANDIDATES = 8
    data = fb.data.load("digits").per_class(4, seed=0)
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in itertools.product(TEACHING, SCHEDULES, METHODS):
        key = " ".join(part or "fixed" for part in case)
        if key not in rows:
            rows[key] = run(*case, data)
            RESULTS.write_text(json.dumps(rows, indent=0, sort_keys=True) + "\n")
            print(key, rows[key], flush=True)
    print(Counter(row["outcome"] for row in rows.values()))
    for engine in ("onnxruntime", "openvino"):
        trained = [row[engine] for row in rows.values() if engine in row]
        print(engine, Counter(text.split(":")[0] if ":" in text else "exported" for text in trained))


if __name__ == "__main__":
    main()
