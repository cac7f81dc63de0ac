"""Packed networks on the Hugging Face Hub: one file up, one file down."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import Tensor, nn

from .deploy import load_packed, pack

FILE = "student-packed.safetensors"
CARD = """---
library_name: fewbits
tags: [fewbits, quantized, image-classification]
---
A low-bit network, packed by fewbits.

```python
import fewbits as fb

network = fb.hub.load("{repo_id}"{model})
```
"""
MISSING = 'huggingface_hub is not installed: pip install "fewbits[hub]"'


def push(
    student: nn.Module,
    repo_id: str,
    *,
    run: str | os.PathLike[str] | None = None,
    example: Tensor | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Pack ``student`` and upload it; the repository is made if it is not there, a model card only where none is.

    Args:
        student: see ``pack``.
        repo_id: ``"user/name"``.
        run: see ``pack``; with it the file is loaded without its architecture.
        example: see ``pack``.
        private: whether a new repository is private.
        token: of the Hub; None takes the one that is logged in.

    Returns:
        The address of the commit.

    Raises:
        ImportError: huggingface_hub is not installed.
        ParityError, TypeError, ValueError: see ``pack``.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(MISSING) from error
    with tempfile.TemporaryDirectory() as folder:
        path = pack(student, Path(folder) / FILE, run=run, example=example).path
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if not api.file_exists(repo_id, "README.md"):
            card = CARD.format(repo_id=repo_id, model="" if run is not None else ", model=...").encode()
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id)
        return str(api.upload_file(path_or_fileobj=path, path_in_repo=FILE, repo_id=repo_id))


def load(
    repo_id: str, model: nn.Module | None = None, *, revision: str | None = None, token: str | None = None
) -> nn.Module:
    """Download a packed network, or take it from the Hub's cache, and load it.

    Args:
        repo_id: ``"user/name"``.
        model: see ``load_packed``.
        revision: a branch, a tag or a commit; None is the newest.
        token: of the Hub; None takes the one that is logged in.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: the Hub cannot be reached, or has no such repository or file.
        ValueError: see ``load_packed``.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(MISSING) from error
    return load_packed(hf_hub_download(repo_id, FILE, revision=revision, token=token), model)
