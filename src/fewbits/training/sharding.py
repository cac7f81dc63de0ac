"""FSDP: weights, gradients and momentum of every network in shares, one for each process.

The objective is one unit (``fully_shard`` of PyTorch): its forward pass gathers what all networks need, teacher and
helpers among them, and its backward pass gives each process its share of the gradients. So whatever a recipe does
inside is done with whole weights, and every recipe works. Quantizers' parameters are a few numbers, 0-d ones among
them, which FSDP does not take: each process has them all, and their gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..distill import Objective
from ..quantizers import Quantizer


class Sharding:
    """An objective in shares, until ``undo``.

    Args:
        objective: changed in place; made by all processes alike.
        device: where this process computes.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._of_quantizers = {id(p) for q in objective.modules() if isinstance(q, Quantizer) for p in q.parameters()}
        self._places = [
            (module, name, parameter)
            for module in objective.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if not self._is_kept_whole(parameter)
        ]
        self._kept = [parameter for parameter in objective.parameters() if self._is_kept_whole(parameter)]
        for _, _, parameter in self._places:
            parameter.data = parameter.data.contiguous()  # FSDP takes no other layout
        self._bookkeeping = [_Bookkeeping(module) for module in objective.modules()]
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        fully_shard(objective, mesh=mesh, ignored_params=set(self._kept))
        register_fsdp_forward_method(objective, "teach")
        self._objective = objective
        self._unit = cast(FSDPModule, objective)
        for _, _, parameter in self._places:
            parameter.data = parameter.new_empty(0)  # the shares are copies

    def _is_kept_whole(self, parameter: Tensor) -> bool:
        return id(parameter) in self._of_quantizers or parameter.ndim == 0

    def synchronise(self, on: bool) -> None:
        """Whether the next backward pass shares its gradients, or keeps them for the next micro-batch."""
        self._unit.set_requires_gradient_sync(on)

    def reduce(self) -> None:
        """After the last backward pass: average the gradients of what is kept whole."""
        grads = [parameter.grad for parameter in self._kept if parameter.grad is not None]
        if grads:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it each network has its weights, and the first process's buffers: to evaluate it, or to save it."""
        for buffer in self._objective.buffers():
            dist.broadcast(buffer, 0)
        self._unit.unshard()
        try:
            yield
        finally:
            self._unit.reshard()

    @torch.no_grad()
    def undo(self) -> None:
        """Put the parameters back that the networks came with, at their present values; all processes must ask."""
        with self.whole():
            pass
        for module, name, parameter in self._places:
            share = module.get_parameter(name)
            parameter.data = share.full_tensor() if isinstance(share, DTensor) else share.data
            setattr(module, name, parameter)
        for kept in self._bookkeeping:
            kept.restore()


class _Bookkeeping:
    """What FSDP leaves on a module: hooks on its state dict, which hold the shares, and marks."""

    HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hooks = {name: list(module.__dict__[name].items()) for name in self.HOOKS if name in module.__dict__}

    def restore(self) -> None:
        """As it was."""
        for name, hooks in self._hooks.items():
            held = self._module.__dict__[name]
            held.clear()
            held.update(hooks)
        for name in self.MARKS:
            self._module.__dict__.pop(name, None)


def squared_norm(grads: list[Tensor]) -> Tensor:
    """The sum of squares of whole gradients and of shares, over all processes; 0-d."""
    if not grads:
        return torch.zeros(())
    shares = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    total = _sum_of_squares([grad for grad in grads if not isinstance(grad, DTensor)], grads[0])
    if shares:
        over_all = _sum_of_squares(shares, shares[0])
        dist.all_reduce(over_all)
        total = total + over_all
    return total


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    zero = torch.zeros((), device=like.device)
    return sum((tensor.detach().float().square().sum() for tensor in tensors), zero)


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for shares; all processes must ask."""
    # In one order: an optimizer's state stands in the order in which a process happened to load it.
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in sorted(tensors.items())}


def scatter_state(optimizer: torch.optim.Optimizer) -> None:
    """Cut what an optimizer has gathered of a parameter, loaded whole, like the parameter."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for key, value in state.items():
                state[key] = _cut_like(parameter, value)


def _cut_like(parameter: DTensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    # Each process cuts its own share of what it has loaded: nothing is sent, whatever the order.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_share(parameter: nn.Parameter) -> bool:
    """Whether this process holds only a part of it."""
    return isinstance(parameter, DTensor)
