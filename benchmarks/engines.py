"""Size and latency of ResNet-18 at 224 x 224 in both engines: float, 8/8, 4/4, 2/2, and binary.

Weights are random (there are no ImageNet weights here) and ranges calibrated on 17 Flowers: times and sizes are those
of a trained network, predictions are nobody's. The binary network has Bi-Real's double shortcuts, PReLU and ReActNet's
thresholds; its stem, classifier and three 1x1 shortcuts have 8 bits (a row of its own: float shortcuts, as in its
papers); OpenVINO runs its convolutions on the XNOR kernel. Files are timed interleaved, batch 1; each export has been
checked layer by layer against PyTorch.

    python benchmarks/engines.py --threads 1 2

Every row goes to benchmarks/results/engines-resnet18.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits as fb
from fewbits.blocks import bireal
from fewbits.deploy import bench

RESULTS = Path(__file__).parent / "results" / "engines-resnet18.json"
SIZE, IMAGES = 224, 8


def networks() -> dict[str, nn.Module]:
    """By name; the float one first."""
    torch.manual_seed(0)
    network = fb.models.build("timm:resnet18", num_classes=1000, image_size=SIZE)
    # timm starts the last batch norm of each block at zero, and what is multiplied by zero need not be shipped.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    students = {f"{bits}/{bits}": fb.quantize(network, bits, bits) for bits in (8, 4, 2)}
    rules = [fb.Rule("*.shortcut.conv", 8, 8, "lsq")]
    made = bireal(network, "prelu", float_shortcut=False)
    return {
        "float": network,
        **students,
        "1/1": fb.quantize(made, 1, 1, quantizer="react", rules=rules),
        "1/1 float shortcuts": fb.quantize(bireal(network, "prelu"), 1, 1, quantizer="react"),
    }


def main() -> None:
    """Export, measure, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    images = fb.data.load("flowers17", image_size=SIZE).pixels(IMAGES)
    files: dict[str, Path] = {}
    shipped: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks().items():
            if name != "float":
                fb.calibrate(network, [images])
            network.train()
            with torch.no_grad():
                for _ in range(3):
                    network(images)
            for engine in ("onnxruntime", "openvino"):
                is_binary = name.startswith("1/1") and engine == "openvino"
                path = (
                    Path(folder)
                    / f"{name.replace('/', '-').replace(' ', '-')}-{engine}{'.xml' if is_binary else '.onnx'}"
                )
                # Random weights put all classes a hair apart: the layers are what has to agree.
                made = fb.export(network, path, example=images, normalisation=None, engine=engine, minimum_equal=0.0)
                label = f"{name}, {engine}"
                files[label] = made.path
                kernels = Counter(layer.kernel for layer in made.layers)
                shipped[label] = {"theoretical_bytes": made.theoretical_bytes, "kernels": dict(kernels)}
                print(label, made.size_bytes, dict(kernels), flush=True)
        rows = [
            asdict(row) | shipped[row.name]
            for threads in arguments.threads
            for row in bench(files, images, batch_sizes=[1], repeats=arguments.repeats, threads=threads)
        ]
    for row in rows:
        print(f"{row['name']:22} {row['threads']} threads {row['latency_ms']:7.2f} ms  {row['ratio']:.3f}")
    machine = {"machine": platform.machine(), "versions": {n: version(n) for n in ("onnxruntime", "openvino", "torch")}}
    RESULTS.write_text(json.dumps({**machine, "rows": rows}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
