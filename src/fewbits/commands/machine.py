"""What ran a measurement."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..deploy.kernels import processor

ENGINES = ("onnxruntime", "openvino")


def machine() -> dict[str, Any]:
    """Processor, cores, and the engines that are installed, by version."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
    for name in ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
