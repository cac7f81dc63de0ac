"""Packed networks on the Hugging Face Hub: one file up, one file down; and the Hub's usual mixin, ``PackedModel``."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .deploy import load_packed, pack
from .deploy.packed import read_header

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
MIXIN_CARD = """---
{{ card_data }}
---
A low-bit network, packed by fewbits.

```python
import fewbits as fb

network = fb.hub.PackedModel.from_pretrained("{{ repo_id | default('user/name', true) }}")
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


@functools.cache
def _packed_model() -> type[nn.Module]:
    """``PackedModel``, made when it is first asked for: its base class comes with an extra."""
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError as error:
        raise ImportError(MISSING) from error

    class PackedModel(
        nn.Module,
        ModelHubMixin,
        library_name="fewbits",
        tags=["fewbits", "quantized"],
        pipeline_tag="image-classification",
        model_card_template=MIXIN_CARD,
    ):
        """A quantized network with the Hub's usual methods: save_pretrained, push_to_hub, from_pretrained.

        What is saved is the file of ``pack``. ``from_pretrained(name)`` takes a folder or a repository, one that
        ``push`` made too; where the file does not say its architecture, ``from_pretrained(name, model=...)`` does.

        Args:
            network: a quantized and calibrated student, or what ``load_packed`` gives; ``export`` takes it from here.
        """

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Any:
            """What the network gives for ``images``."""
            return self.network(images)

        def _save_pretrained(self, save_directory: Path) -> None:
            path = pack(self.network, save_directory / FILE).path
            header = read_header(path)
            # The Hub counts downloads of this file, and shows what is in it.
            config = {key: header.get(key) for key in ("fewbits", "model", "plan", "data", "normalisation")}
            (save_directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, model: nn.Module | None = None, **where: Any) -> PackedModel:
            folder = Path(model_id)
            path = folder / FILE if folder.is_dir() else hf_hub_download(model_id, FILE, **where)
            return cls(load_packed(path, model))

    PackedModel.__qualname__ = "PackedModel"
    return PackedModel


def __getattr__(name: str) -> Any:
    if name == "PackedModel":
        return _packed_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
