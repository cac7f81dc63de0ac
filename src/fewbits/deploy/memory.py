"""How much memory an engine needs for a file, at most, measured in a process of its own.

Run as ``python -m fewbits.deploy.memory FILE THREADS C H W N ...``; prints the peaks in bytes as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TIMEOUT = 600
INPUT, OUTPUT = "images", "logits"


def peaks(path: Path, image: Sequence[int], batch_sizes: Sequence[int], *, threads: int = 1) -> list[int] | None:
    """Bytes that loading a file and running it add to a process at most, for each batch size.

    Args:
        path: an exported file.
        image: C, H, W.
        batch_sizes: images at a time, ascending: a peak holds what the smaller ones left.
        threads: of the engine.

    Returns:
        None where the system does not tell: only Linux keeps a peak that can be reset, and where the process fails a
        warning says why, so that what else was measured is not lost.
    """
    if not RESET.exists():
        return None
    numbers = [str(number) for number in (threads, *image, *batch_sizes)]
    command = [sys.executable, "-m", "fewbits.deploy.memory", str(path), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        said = done.stderr.strip()[-500:]
        warnings.warn(f"the memory of {path.name} could not be measured: {said}", stacklevel=2)
        return None
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(path: Path, threads: int, image: Sequence[int], batch_sizes: Sequence[int]) -> list[int]:
    from .engines import ENGINES, engine_of

    engine = ENGINES[engine_of(path)]
    # What the engine's own libraries take is not the file's.
    engine.open(_relu()).run({INPUT: np.zeros((1, 1), np.float32)})
    batches = [np.zeros((size, *image), np.float32) for size in batch_sizes]
    RESET.write_text("5")
    before = _status("VmRSS")
    session = engine.open(path, threads=threads)
    found = []
    for batch in batches:
        session.run({INPUT: batch})
        found.append(max(0, _status("VmHWM") - before))
    return found


def _relu() -> Any:
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1]) for name in (INPUT, OUTPUT)]
    graph = helper.make_graph([helper.make_node("Relu", [INPUT], [OUTPUT])], "relu", ports[:1], ports[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    count, channels, height, width, *sizes = map(int, sys.argv[2:])
    print(json.dumps(_main(Path(sys.argv[1]), count, (channels, height, width), sizes)))
