"""Capture what modules take and give during one forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from .base import Tap


class Removable(Protocol):
    """What a hook gives back."""

    def remove(self) -> None:
        """Take the hook off."""
        ...


class Taps:
    """Forward hooks that write tapped tensors into ``features``.

    They are registered before the objective is compiled, so that they are traced with it.
    """

    def __init__(self, taps: Iterable[Tap], student: nn.Module, teacher: nn.Module | None) -> None:
        self.features: dict[Tap, Tensor] = {}
        self._handles: list[Removable] = []
        for tap in dict.fromkeys(taps):
            network = student if tap.network == "student" else teacher
            modules = {} if network is None else dict(network.named_modules())
            if tap.module not in modules:
                raise ValueError(f"the {tap.network} has no module {tap.module!r} to tap; see model.named_modules()")
            module = modules[tap.module]
            if tap.side == "input":
                self._handles.append(module.register_forward_pre_hook(self._keep_input(tap)))
            else:
                self._handles.append(module.register_forward_hook(self._keep_output(tap)))

    def _keep_input(self, tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.features[tap] = args[0]

        return hook

    def _keep_output(self, tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.features[tap] = output

        return hook

    def collect(self) -> dict[Tap, Tensor]:
        """The tensors of the pass that just ran; they are not kept."""
        taken = dict(self.features)
        self.features.clear()
        return taken

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
