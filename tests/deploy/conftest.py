import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fewbits.convert import float_state
from fewbits.deploy import graph as graph_module
from fewbits.quantizers import Quantizer


@pytest.fixture(autouse=True, scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tracing takes most of an export; networks that differ in their quantizers' numbers alone share one trace."""
    kept: dict[str, Any] = {}
    trace = graph_module.trace

    def cached(student: torch.nn.Module, example: torch.Tensor, normalisation: Any) -> Any:
        key = _key(student, example, normalisation)
        if key not in kept:
            kept[key] = trace(student, example, normalisation)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "trace", cached)
        # What somebody measured on this machine chooses no kernels here.
        patch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _key(student: torch.nn.Module, example: torch.Tensor, normalisation: Any) -> str:
    """Everything that a trace depends on: the modules, which quantizers are on, the float numbers, sizes."""
    found = hashlib.sha256(repr((tuple(example.shape[1:]), normalisation)).encode())
    for name, module in student.named_modules():
        own = (
            bool(module.enabled)
            if isinstance(module, Quantizer)
            else f"{type(module).__qualname__} {module.extra_repr()}"
        )
        found.update(f"{name} {own} ".encode())
    for name, tensor in float_state(student).items():
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()
