"""Which layers of an exported file cost the most, by the engine's own profiler."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sessions import open_session

if TYPE_CHECKING:
    import onnx

MULTIPLYING = ("Conv", "Gemm", "MatMul")
PRODUCTS = ("Convolution", "GroupConvolution", "BinaryConvolution", "MatMul")
FOLLOWERS = 4
SUFFIXES = (".packed", ".codes", ".weight")
KERNEL_TIME = "_kernel_time"
FUSED = "_token_"
"""ONNX Runtime puts it, and a number, behind the name of a layer whose neighbours it fused to it."""


@dataclass(frozen=True)
class Cost:
    """One operator of the engine's own graph.

    Args:
        name: of the layer, as the network calls it; of the operator where it is no layer.
        kernel: what the engine runs.
        ms: time of one inference, the median (OpenVINO: the mean); profilers add some microseconds to each.
        share: of all operators together, 0 to 1.
    """

    name: str
    kernel: str
    ms: float
    share: float


def ranked(times: Mapping[tuple[str, str], list[float]]) -> list[Cost]:
    """The most expensive first.

    Args:
        times: milliseconds by name and kernel, one for each inference.
    """
    medians = {key: statistics.median(values) for key, values in times.items()}
    total = sum(medians.values()) or 1.0
    rows = [Cost(name, kernel, ms, ms / total) for (name, kernel), ms in medians.items()]
    return sorted(rows, key=lambda row: -row.ms)


def of_onnxruntime(path: Path, feeds: Mapping[str, Any], *, threads: int, repeats: int) -> list[Cost]:
    """See ``Engine.costs``. In a copy, operators are named after their layers: names survive the engine's fusions."""
    import onnx

    model = onnx.load(path)
    layers = layers_of(model)
    for node in model.graph.node:
        node.name = layers.get(node.output[0], f"{node.op_type} {node.output[0]}")
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "profile")
        session = open_session(model.SerializeToString(), threads=threads, profile=prefix)
        for _ in range(1 + repeats):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL_TIME):
            name = event["name"].removesuffix(KERNEL_TIME).partition(FUSED)[0]
            times[name, event["args"]["op_name"]].append(event["dur"] / 1e3)
    # The first inference plans memory.
    return ranked({key: values[1:] for key, values in times.items()})


def of_openvino(path: Path, feeds: Mapping[str, Any], *, threads: int, repeats: int) -> list[Cost]:
    """See ``Engine.costs``."""
    from .openvino_runtime import Compiled

    compiled = Compiled(path, threads=threads)
    compiled.options["PERF_COUNT"] = True
    arrays = list(feeds.values())
    network = compiled.network(tuple(map(len, arrays)))
    layers: dict[str, str] = {}
    for node in compiled.graph.get_ordered_ops():
        if node.get_type_name() in PRODUCTS and (layer := _constant(node.input_value(1))):
            # What a product is fused with may keep the name of one of those that follow it.
            for name in _followers(node):
                layers.setdefault(name, layer)
    names = {}
    for node in network.get_runtime_model().get_ops():
        parts = node.get_rt_info()["originalLayersNames"].astype(str).split(",")
        own = node.get_friendly_name()
        names[own] = next((layers[part] for part in parts if part in layers), own)
    request = network.create_infer_request()

    def totals(count: int) -> dict[tuple[str, str], float]:
        for _ in range(count):
            request.infer(arrays)
        found: dict[tuple[str, str], float] = defaultdict(float)
        for info in request.get_profiling_info():
            key = names.get(info.node_name, info.node_name), f"{info.node_type} {info.exec_type}"
            found[key] += info.real_time.total_seconds() * 1e3
        return found

    # OpenVINO tells the mean of all inferences so far, and the first one packs weights.
    first, all_ = totals(1), totals(repeats)
    times = {key: max(0.0, (mean * (1 + repeats) - first[key]) / repeats) for key, mean in all_.items()}
    return ranked({key: [ms] for key, ms in times.items() if ms})


def layers_of(model: onnx.ModelProto) -> dict[str, str]:
    """The layer of each operator that multiplies weights, by the name of what it makes."""
    made = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}

    def weight(name: str) -> str:
        node = made.get(name)
        if node is None:
            return name if name in stored else ""
        return weight(node.input[0]) if node.input and node.op_type not in MULTIPLYING else ""

    found = {node.output[0]: weight(node.input[1]) for node in model.graph.node if node.op_type in MULTIPLYING}
    return {output: layer_name(stored) for output, stored in found.items() if ".weight" in stored}


def layer_name(stored: str) -> str:
    """The layer that a constant belongs to: ``layer1.0.conv1`` for ``layer1.0.conv1.weight.packed``."""
    for suffix in SUFFIXES:
        stored = stored.removesuffix(suffix)
    return stored.removesuffix(".weight")


def _constant(output: Any) -> str:
    """The layer of the first named constant above a value."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        name: str = node.get_friendly_name()
        return layer_name(name) if ".weight" in name else ""
    if node.get_type_name() in PRODUCTS:
        return ""
    return next((found for port in node.input_values() if (found := _constant(port))), "")


def _followers(node: Any) -> Iterator[str]:
    """Names of an operator and of those behind it, as long as each has one reader."""
    for _ in range(FOLLOWERS):
        yield node.get_friendly_name()
        readers = list(node.output(0).get_target_inputs())
        if len(readers) != 1:
            return
        node = readers[0].get_node()
        if node.get_type_name() in PRODUCTS:
            return
