"""A checksum of named tensors: which network, or which student, something belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor], said: str = "") -> str:
    """SHA-256 of ``said``, then of names, types, shapes and values, in the order of the names; hexadecimal.

    >>> digest_of({"w": torch.zeros(2, 3)}) == digest_of({"w": torch.zeros(3, 2)})
    False
    """
    found = hashlib.sha256(said.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
