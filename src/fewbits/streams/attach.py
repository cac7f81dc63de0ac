"""Hang a stream's quantizer on a module, as a hook that ``state_dict`` knows by name."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor, nn

from ..quantizers import Quantizer
from ..quantizers.again import keeping_input

OUTPUT_STREAM = "output_stream"
INPUT_STREAM = "input_stream"


def attach(module: nn.Module, side: Literal["input", "output"], quantizer: Quantizer) -> None:
    """Hang ``quantizer`` on what ``module`` takes or gives."""
    if side == "output":
        module.add_module(OUTPUT_STREAM, quantizer)
        module.register_forward_hook(_quantize_output)
    else:
        module.add_module(INPUT_STREAM, quantizer)
        module.register_forward_pre_hook(_quantize_input)


def first_reader(module: nn.Module) -> Quantizer | None:
    """The stream's quantizer on what ``module`` gives, unless another hook comes before it."""
    first = next(iter(module._forward_hooks.values()), None)
    return cast(Quantizer, module.get_submodule(OUTPUT_STREAM)) if first is _quantize_output else None


def _quantize_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return keeping_input(module.get_submodule(OUTPUT_STREAM), output)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (keeping_input(module.get_submodule(INPUT_STREAM), args[0]), *args[1:])
