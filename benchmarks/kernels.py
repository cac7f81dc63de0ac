r"""Does choosing kernels by measured times pay? ResNet-18 with one-bit weights and two-bit activations in OpenVINO.

Random weights, 224 x 224 pixels, batch 1, one thread: the layers of the network are measured on this machine (into a
table of this script's own), then the network is exported by the default rule and by the table, and both files are timed
beside float in one interleaved run.

    python benchmarks/kernels.py          # on a machine that does nothing else

Numbers go to benchmarks/results/kernels-w1a2.json.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import ship

import fewbits as fb
from fewbits.commands.machine import machine
from fewbits.deploy import bench, measure_kernels

RESULTS = Path(__file__).parent / "results" / "kernels-w1a2.json"
REPEATS = 30


def main() -> None:
    """Measure, export, time, write down."""
    network = ship.NETWORKS["resnet18"]
    images, model = ship.images_of(network), ship.float_network(network)
    student = fb.quantize(model, 1, 2)
    fb.calibrate(student, [images])
    student = ship.lived(student, images)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEWBITS_CACHE"] = folder
        layers = measure_kernels(student, example=images, normalisation=None, repeats=REPEATS)
        files, chosen = {"float": Path(folder) / "float.xml"}, {}
        fb.export(model, files["float"], example=images, normalisation=None, engine="openvino", minimum_equal=0.0)
        for kernels in ("default", "table"):
            files[kernels] = Path(folder) / f"{kernels}.xml"
            made = fb.export(
                student,
                files[kernels],
                example=images,
                normalisation=None,
                engine="openvino",
                minimum_equal=0.0,
                kernels=kernels,
            )
            chosen[kernels] = {layer.name: layer.kernel for layer in made.layers}
        rows = [asdict(row) for row in bench(files, images, batch_sizes=[1], repeats=REPEATS)]
    for row in rows:
        print(f"{row['name']:8} {row['latency_ms']:6.2f} ms  {row['ratio']:.3f}  {row['size_bytes']:,} bytes")
    for shape, times in layers.items():
        print(shape, times)
    measured = {"machine": machine(), "rows": rows, "layers": layers, "kernels": chosen}
    RESULTS.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
