"""Networks of the timm library, by `timm:NAME`; the only place that imports timm."""

import difflib
from types import ModuleType

import torch
from torch import Tensor, nn

from fewbits.data import Normalisation
from fewbits.data.torchvision_import import import_torchvision

PREFIX = "timm:"


def import_timm() -> ModuleType:
    """Returns timm, also beside a torchvision that was built for another torch.

    Raises:
        ValueError: it, or torchvision, which it needs, is not installed.
    """
    try:
        import_torchvision()
        import timm
    except ImportError as error:
        raise ValueError(f'timm models need two more packages ({error}): pip install "fewbits[timm]"') from error
    return timm


def build_timm(name: str, *, num_classes: int, channels: int, image_size: int | None = None) -> nn.Module:
    """A network with random weights.

    Args:
        name: timm's, without the prefix.
        image_size: pixels a side, for transformers whose position embeddings depend on it; others ignore it.

    Raises:
        ValueError: a name that timm does not know (with close ones), or sizes that the network cannot take.
    """
    timm = import_timm()
    check_name(timm, name)
    options: dict[str, object] = {"pretrained": False, "num_classes": num_classes, "in_chans": channels}
    try:
        if image_size is None:
            model: nn.Module = timm.create_model(name, **options)
        else:
            model = _with_image_size(timm, name, image_size, options)
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"timm:{name} cannot be built for {num_classes} classes, {channels} channels and image size {image_size}: "
            f"{error}"
        ) from error
    for module in model.modules():
        if type(module) is timm.layers.Linear:
            # Outside of TorchScript it computes what its parent does; as a subclass it would not be quantized.
            module.__class__ = nn.Linear
    model.architecture = f"{PREFIX}{name}"  # type: ignore[assignment]  # a text for errors, not a module
    return model


def _with_image_size(timm: ModuleType, name: str, image_size: int, options: dict[str, object]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **options)  # a network for any size
    return model


def check_name(timm: ModuleType, name: str) -> None:
    """Raises ValueError for an unknown model, with the nearest names."""
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them all"
    raise ValueError(f"model must be one that timm knows, got {PREFIX}{name}; {hint}")


def pretrained_timm(name: str) -> tuple[dict[str, Tensor], Normalisation] | None:
    """Timm's own weights, fetched through its cache, or None where it has none.

    Raises:
        ValueError: an unknown name, or weights that could not be fetched.
    """
    timm = import_timm()
    check_name(timm, name)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return None
    try:
        with torch.random.fork_rng():  # random weights that are overwritten must not move the run's generator
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub raises its own kinds for no network, no such file and no right
        raise ValueError(
            f"the weights of {PREFIX}{name} could not be fetched ({type(error).__name__}: {error}); "
            "download them where there is a network and give the file, or train from random weights"
        ) from error
    return model.state_dict(), Normalisation(tuple(config.mean), tuple(config.std))
