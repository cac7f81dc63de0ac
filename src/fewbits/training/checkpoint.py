"""Our own checkpoint: one safetensors file, its header holding JSON. Written atomically, read without pickle."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

FORMAT = 1
FILE = "state.safetensors"


@dataclass
class Checkpoint:
    """Everything that continues a run: named tensors, and plain values that survive JSON."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Put ``tensors`` under ``prefix/``."""
        self.tensors |= {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}

    def part(self, prefix: str) -> dict[str, Tensor]:
        """What was put under ``prefix/``."""
        start = f"{prefix}/"
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step: whoever reads it, at any moment, finds the old file or the new one, whole.

    Raises:
        OSError: the disk is full or not writable; the previous file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(
            error.errno,
            f"could not save {path.name} ({error.strerror}); the previous one is untouched: make room, then --resume",
            str(path),
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors: equal tensors give equal bytes, for nothing else is in the file."""
    whole = {name: _own(tensor) for name, tensor in tensors.items()}
    write_file(path, save(whole, metadata=dict(metadata) if metadata else None))


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses memory that two names share; tied weights are written twice and loaded into both.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder/state.safetensors``; the previous one stays until the new one is complete."""
    header = json.dumps({"format": FORMAT, **checkpoint.values}, sort_keys=True)
    save_tensors(folder / FILE, checkpoint.tensors, {"fewbits": header})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and the metadata of its header.

    Raises:
        ValueError: the file is truncated, or something else.
    """
    try:
        # Read once: safe_open opens a file twice, and between the two a run may have put its next checkpoint there.
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__", {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); delete it to start afresh") from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in ``folder``, or None where there is none.

    Raises:
        ValueError: the file is truncated, not ours, or of a newer format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    if "fewbits" not in metadata:
        raise ValueError(f"{path} is not a fewbits checkpoint: its header has no 'fewbits' entry")
    try:
        values = dict(json.loads(metadata["fewbits"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its 'fewbits' entry is no JSON object ({error})") from error
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} has another checkpoint format than {FORMAT}; use the version that wrote it")
    return Checkpoint(tensors, values)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors ``{index}.{key}`` and plain values ``{index}.{key}``."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}.{key}"] = value
    return tensors, values


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what ``optimizer_state`` took; groups come from the settings and are already there."""
    whole = optimizer.state_dict()
    count = sum(len(group["params"]) for group in whole["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *values.items()]:
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= count:
            raise ValueError(f"the checkpoint's optimizer has {name!r}, but this run has {count} parameters")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def load_networks(networks: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load networks and helpers strictly.

    Raises:
        ValueError: a name or a shape differs.
    """
    try:
        networks.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint belongs to other networks: {error}") from error
