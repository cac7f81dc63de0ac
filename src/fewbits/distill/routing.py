"""How gradients pass between the residual blocks of the student: through, or not at all (block-wise training)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .base import NetworkName, Networks, Routing
from .taps import Removable


class BlockInputs:
    """Forward pre-hooks that exchange what the student's blocks take, in an objective's own passes alone.

    ``"through"``: nothing; a loss trains its block and all before it. ``"detached"``: the block's own input without its
    gradient. ``"teacher_input"``: what the teacher's block took, as in BRECQ; the teacher has to run first.

    Like taps, they are registered before the objective is compiled. An evaluation does not notice them.

    Raises:
        ValueError: the networks have no blocks, or different numbers of them.
    """

    def __init__(self, routing: Routing, networks: Networks) -> None:
        self._routing = routing
        self._is_active = False
        self._taken: dict[int, Tensor] = {}
        self._handles: list[Removable] = []
        if routing == "through":
            return
        students = _blocks(networks, "student")
        if routing == "teacher_input":
            teachers = _blocks(networks, "teacher")
            if len(teachers) != len(students):
                raise ValueError(
                    f"routing 'teacher_input' pairs blocks, but the student has {len(students)} and the teacher "
                    f"{len(teachers)}; use a teacher of the same depth, or routing 'detached'"
                )
            for index, block in enumerate(teachers):
                self._handles.append(block.register_forward_pre_hook(self._take(index)))
        for index, block in enumerate(students):
            hook = self._detach if routing == "detached" else self._give(index)
            self._handles.append(block.register_forward_pre_hook(hook))

    def _take(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._is_active:
                self._taken[index] = args[0]

        return hook

    def _give(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (self._taken[index].detach(), *args[1:]) if self._is_active else None

        return hook

    def _detach(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0].detach(), *args[1:]) if self._is_active else None

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """The hooks work within, and only there."""
        # Compiled code looks at no hooks: the routing has to be read, or one objective's code would serve another's.
        self._is_active = self._routing != "through"
        try:
            yield
        finally:
            self._is_active = False
            self._taken.clear()

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _blocks(networks: Networks, name: NetworkName) -> list[nn.Module]:
    blocks = networks.anatomy(name).blocks
    if not blocks:
        raise ValueError(f"the {name} has no residual blocks that its names tell; pass anatomy=Anatomy(...)")
    return [networks.network(name).get_submodule(block) for block in blocks]
