"""What ran a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENGINES = ("onnxruntime", "openvino")


def machine() -> dict[str, Any]:
    """Processor, cores, and the engines that are installed, by version."""
    model = next(
        (line.split(":")[1].strip() for line in _processor() if line.startswith("model name")), platform.machine()
    )
    found = {"processor": model, "cores": os.cpu_count()}
    for name in ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
