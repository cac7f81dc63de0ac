"""Which student a file was exported from: a checksum of its numbers, of the normalisation and of what the file says."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..digest import digest_of
from ..layers import QuantLayer
from .engines import ENGINE
from .prepare import trained_with
from .variants import VARIANT, VARIANTS, variant_of

if TYPE_CHECKING:
    from .graph import Normalisation

SEAL = "seal"
"""Key in a file's metadata."""

LENGTH = 16
"""Hexadecimal digits: 64 bits tell a run's files from stale and foreign ones, and cost a few bytes."""


def digest(student: nn.Module, normalisation: Normalisation | None) -> str:
    """SHA-256 of what is exported: quantized weights as their values, all else of the state, and the normalisation.

    So a network that was packed and loaded is the student that it came from.
    """
    network = copy.deepcopy(student).cpu().float().eval()
    state, quantized = dict(network.state_dict()), dict[str, torch.Tensor]()
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None and layer.weight_quantizer.enabled:
                prefix = f"{name}." if name else ""
                own = f"{prefix}weight_quantizer."
                state = {key: tensor for key, tensor in state.items() if not key.startswith(own)}
                # Zero has a sign, and codes have not.
                quantized[f"{prefix}weight"] = layer.weight_quantizer(layer.weight) + 0.0
    return digest_of(state | quantized, repr(normalisation and (normalisation.mean, normalisation.std)))


def sealed(metadata: Mapping[str, str], student: str) -> dict[str, str]:
    """``metadata`` with the seal of a student, given by its ``digest``; every entry is under it but who built it."""
    said = {key: value for key, value in metadata.items() if key not in (SEAL, ENGINE, VARIANT)}
    whole = hashlib.sha256(f"{student} {json.dumps(said, sort_keys=True)}".encode())
    return {**metadata, SEAL: whole.hexdigest()[:LENGTH]}


def check(path: Path, student: nn.Module, normalisation: Normalisation | Literal["trained"] | None) -> dict[str, str]:
    """The metadata of a file that was exported from ``student`` as it is now.

    Raises:
        ImportError: the engine is not installed.
        ValueError: there is no such file, it is damaged, or it was exported from another student or before training.
    """
    name, variant = variant_of(path)
    metadata = VARIANTS[name][variant].metadata(path)
    if SEAL not in metadata:
        raise ValueError(
            f"{path.name} does not say which student it comes from: an older version of fewbits wrote it; export again"
        )
    known = trained_with(student) if normalisation == "trained" else normalisation
    if sealed(metadata, digest(student, known))[SEAL] != metadata[SEAL]:
        raise ValueError(
            f"{path.name} is not what this student exports to: it comes from another run, or from this one before it "
            "was trained again, or is damaged; export again, or remove it"
        )
    return metadata
