r"""Size and latency of whole networks in both engines, float and low-bit, beside ONNX Runtime's own int8.

ResNet-20 has its CIFAR-10 weights, the others random ones (there are no ImageNet weights here), with ranges calibrated
on CIFAR-10 or 17 Flowers and biases settled, as at the end of ``fit``: times and sizes are those of trained networks,
predictions are nobody's. The binary ResNet-18 has Bi-Real's double shortcuts, PReLU and ReActNet's thresholds; stem,
classifier and 1x1 shortcuts have 8 bits (a row of its own: float shortcuts, as in its papers).
The peer is ``onnxruntime.quantization.quantize_static`` of the same float network and the same images: unsigned
activations, signed weights, its faster kind on x86; in OpenVINO it is NNCF's post-training quantization, where that is
installed.

    python benchmarks/ship.py export          # leaves the files in runs/ship; each is proved layer by layer
    python benchmarks/ship.py bench           # on a machine that does nothing else
    python benchmarks/ship.py table           # Markdown

All files of a network are measured in one interleaved run. Numbers go to benchmarks/results/ship.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.blocks import bireal
from fewbits.commands.machine import machine
from fewbits.deploy import bench
from fewbits.deploy.bench import size_of

RESULTS = Path(__file__).parent / "results" / "ship.json"
FILES = Path("runs/ship")
IMAGES, BITS = 8, (8, 4, 2)
FLOAT, PEER, PEER_OPENVINO = "float", "int8, ONNX Runtime's own", "int8, NNCF's own"


@dataclass(frozen=True)
class Network:
    """What is shipped.

    Args:
        name: as ``fewbits.models.build`` knows it.
        data: where images come from.
        size: of an image.
        classes: of the classifier.
        is_binary: 1/1 with double shortcuts, instead of 8, 4 and 2 bits.
    """

    name: str
    data: str = "flowers17"
    size: int = 224
    classes: int = 1000
    is_binary: bool = False


NETWORKS = {
    "resnet20": Network("resnet20", "cifar10", 32, 10),
    "vgg-small": Network("vgg-small", "cifar10", 32, 10),
    "resnet18": Network("timm:resnet18"),
    "resnet18-binary": Network("timm:resnet18", is_binary=True),
    "mobilenetv2": Network("timm:mobilenetv2_100"),
    "efficientnet-b0": Network("timm:efficientnet_b0"),
    "vit-tiny": Network("timm:vit_tiny_patch16_224"),
}


def images_of(network: Network) -> Tensor:
    """A few training images in 0..1."""
    options = {"image_size": network.size} if network.data == "flowers17" else {}
    return fb.data.load(network.data, **options).pixels(IMAGES)


def float_network(network: Network) -> nn.Module:
    """With its own weights where there are any, else random ones that nothing switches off."""
    torch.manual_seed(0)
    model = fb.models.build(network.name, num_classes=network.classes, image_size=network.size)
    own = fb.models.pretrained(network.name, network.data) if network.data == "cifar10" else None
    if own is not None:
        model.load_state_dict(own[0])
        return model.eval()
    # timm starts the last batch norm of each block at zero, and what is multiplied by zero need not be shipped.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return lived(model, images_of(network))


def lived(model: nn.Module, images: Tensor) -> nn.Module:
    """With statistics in its batch norms."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model.eval()


def students(network: Network, model: nn.Module, images: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """The low-bit networks by name."""
    if not network.is_binary:
        for bits in BITS:
            student = fb.quantize(model, bits, bits)
            fb.calibrate(student, [images])
            fb.settle_biases(student, images)
            yield f"{bits}/{bits}", student
        return
    for name, is_float in (("1/1", False), ("1/1, float shortcuts", True)):
        rules = () if is_float else (fb.Rule("*.shortcut.conv", 8, 8, "lsq"),)
        rewritten = bireal(model, "prelu", float_shortcut=is_float)
        student = fb.quantize(rewritten, 1, 1, quantizer="react", rules=rules)
        fb.calibrate(student, [images])
        fb.settle_biases(lived(student, images), images)
        yield name, student


def export(name: str) -> None:
    """Write and prove every file of a network that is not there."""
    network, folder = NETWORKS[name], FILES / name
    folder.mkdir(parents=True, exist_ok=True)
    images, model = images_of(network), float_network(network)
    described: dict[str, Any] = {}
    for label, student in ((FLOAT, model), *students(network, model, images)):
        for engine in ("onnxruntime", "openvino"):
            suffix = ".xml" if engine == "openvino" and network.is_binary and label != FLOAT else ".onnx"
            path = folder / f"{label}-{engine}".replace("/", "-").replace(", ", "-").replace(" ", "-")
            start = time.perf_counter()
            # Random weights put all classes a hair apart: the layers are what has to agree.
            made = fb.export(
                student,
                path.with_name(path.name + suffix),
                example=images,
                normalisation=None,
                engine=engine,
                minimum_equal=0.0,
            )
            described[f"{label}, {engine}"] = {
                "path": str(made.path),
                "theoretical_bytes": made.theoretical_bytes,
                "float_bytes": made.float_bytes,
                "kernels": dict(Counter(layer.kernel for layer in made.layers)),
                "in_float": {layer.name: layer.reason for layer in made.layers if layer.reason},
                "worst_equal": min((row.equal for row in made.codes), default=1.0),
                "export_seconds": round(time.perf_counter() - start, 1),
            }
            print(name, label, engine, made.size_bytes, described[f"{label}, {engine}"]["kernels"], flush=True)
    source = folder / f"{FLOAT}-onnxruntime.onnx"
    described[PEER] = {"path": str(static_int8(source, folder / "peer-onnxruntime.onnx", images))}
    if importlib.util.find_spec("nncf"):
        described[PEER_OPENVINO] = {"path": str(nncf_int8(source, folder / "peer-openvino.xml", images))}
    (folder / "files.json").write_text(json.dumps(described, indent=1) + "\n")


def static_int8(source: Path, path: Path, images: Tensor) -> Path:
    """ONNX Runtime's static quantization, calibrated on the images one by one."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image.numpy()}

    prepared = path.with_suffix(".prepared.onnx")
    quantization.quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    prepared.unlink()
    return path


def nncf_int8(source: Path, path: Path, images: Tensor) -> Path:
    """NNCF's post-training quantization for OpenVINO, on the same images."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    quantized = nncf.quantize(model, nncf.Dataset(images.split(1), lambda image: image.numpy()))
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return path


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All files of a network beside each other, batch 1, one thread."""
    described: dict[str, dict[str, Any]] = json.loads((FILES / name / "files.json").read_text())
    files = {label: Path(entry["path"]) for label, entry in described.items()}
    images = images_of(NETWORKS[name])
    rows = bench(files, images, batch_sizes=[1], repeats=repeats, threads=1)
    print(name, {row.name: round(row.ratio, 2) for row in rows}, flush=True)
    return {
        row.name: asdict(row) | {k: v for k, v in described[row.name].items() if k != "path"} | {"bytes": size_of(file)}
        for row, file in zip(rows, files.values(), strict=True)
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: one line for each network and bits, both engines side by side."""
    lines = [
        "| network | W/A | ONNX Runtime, ms | to float | file, bytes | times smaller "
        "| OpenVINO, ms | to float | file, bytes | times smaller |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results["networks"].items():
        labels = dict.fromkeys(label.removesuffix(", onnxruntime").removesuffix(", openvino") for label in rows)
        for label in labels:
            cells = [name, label]
            for engine in ("onnxruntime", "openvino"):
                own = {"onnxruntime": PEER, "openvino": PEER_OPENVINO}[engine]
                row = rows.get(f"{label}, {engine}") or (rows.get(label) if label == own else None)
                whole = rows[f"{FLOAT}, {engine}"]
                if row is None:
                    cells += ["", "", "", ""]
                    continue
                ratio, smaller = row["latency_ms"] / whole["latency_ms"], whole["bytes"] / row["bytes"]
                cells += [f"{row['latency_ms']:.2f}", f"{ratio:.2f}", f"{row['bytes']:,}", f"{smaller:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Carry out what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("export", "bench", "table"))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.part == "table":
        print(table(json.loads(RESULTS.read_text())))
        return
    for name in arguments.networks:
        if arguments.part == "export":
            export(name)
            continue
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": {}}
        results["machine"] = machine()
        results["networks"][name] = measure(name, arguments.repeats)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
