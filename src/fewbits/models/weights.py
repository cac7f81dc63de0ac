"""Reading weights from files, and putting them into a network without a silent mismatch."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
PICKLED = (".pt", ".pth", ".th", ".ckpt", ".bin")
SHOWN = 4  # names of each kind that an error lists


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict without running anything that is in the file.

    Args:
        path: .safetensors, .pt, .pth, .th, .ckpt or .bin, or a run folder with `student.safetensors`. A state dict
            inside "state_dict" or "model" is found; a prefix "module." that all names carry is taken off.

    Raises:
        ValueError: no such file; one that is cut, holds more than tensors (it may be malicious) or is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "student.safetensors").is_file():
            raise ValueError(f"{path} holds no student.safetensors; give a finished run's folder or a weights file")
        path = path / "student.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a weights file or a run folder")
    if path.suffix == ".safetensors":
        return _strip_prefixes(_read_safetensors(path))
    if path.suffix in PICKLED:
        return _strip_prefixes(_unwrap(_read_pickled(path), path))
    raise ValueError(f"{path} must end in .safetensors or one of {', '.join(PICKLED)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from error


def _read_pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that other programs choose
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a cut or hostile file can raise anything; torch's own advice is to trust it, so `from None`
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"{path} asks for {wanted[1]}, which is refused: weights are tensors only, and more may run code; "
                "save model.state_dict() alone, or fetch the file again if it is cut"
            ) from None
        raise ValueError(
            f"{path} is cut, damaged, or holds more than tensors, which is refused because it may run code; "
            "fetch it again, or save model.state_dict() alone"
        ) from None


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{path} must hold a state dict, got {type(loaded).__name__}; save model.state_dict()")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if others:
        raise ValueError(f"{path} must hold a state dict, but {_some(others)} are no tensors; save model.state_dict()")
    return dict(loaded)


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Loads every tensor, or none.

    Args:
        what: where the weights come from, for the error.

    Raises:
        ValueError: names that are missing or too many, or other shapes.
    """
    missing, unexpected, shapes = _differences(model, state)
    if missing or unexpected or shapes:
        raise ValueError(_mismatch(model, missing, unexpected, shapes, what))
    model.load_state_dict(dict(state))


def adapt(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Loads everything but a classifier of another shape, which keeps the values that it has.

    Returns:
        The names of the tensors that were not loaded; the caller should say so.

    Raises:
        ValueError: any other mismatch.
    """
    missing, unexpected, shapes = _differences(model, state)
    heads = tuple(f"{head}." for head in classifiers(model))
    fresh = [name for name in shapes if name.startswith(heads)]
    shapes = {name: text for name, text in shapes.items() if name not in fresh}
    if missing or unexpected or shapes:
        raise ValueError(_mismatch(model, missing, unexpected, shapes, "the given file"))
    own = model.state_dict()
    model.load_state_dict({**state, **{name: own[name] for name in fresh}})
    return fresh


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The modules that give the logits: what timm says, else the last linear layer, else the last convolution."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("classifier"):
        named = config["classifier"]
        return (named,) if isinstance(named, str) else tuple(named)
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if found:
            return (found[-1],)
    return ()


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], dict[str, str]]:
    """Missing names, unexpected names, and the shapes that differ in words.

    Files from before PyTorch 0.4.1 lack the batch norms' counters, which nothing of ours reads.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = {
        name: f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    }
    return missing, unexpected, shapes


def _mismatch(model: nn.Module, missing: list[str], unexpected: list[str], shapes: dict[str, str], what: str) -> str:
    architecture = getattr(model, "architecture", type(model).__name__)
    parts = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", list(shapes.values())),
        )
        if names
    ]
    return (
        f"the weights from {what} do not fit {architecture}: {'; '.join(parts)}; "
        "give weights of this architecture, or the architecture of these weights"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
